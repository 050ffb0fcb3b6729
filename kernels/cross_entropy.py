"""cross_entropy_rows: softmax cross entropy of each row of logits, gradient written over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config


@triton.jit
def _logits(row_ptr, bias_ptr, cols, mask):
    """u = logits + bias at ``cols`` in fp32; -inf where ``mask`` is off."""
    u = tl.load(row_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return u


@triton.jit
def _store_gradient(row_ptr, bias_ptr, cols, mask, largest, inverse_total, label, scale):
    """Overwrite logits at ``cols`` by (softmax(u) - onehot(label)) scale."""
    probability = tl.exp(_logits(row_ptr, bias_ptr, cols, mask) - largest) * inverse_total
    gradient = tl.where(cols == label, probability - 1.0, probability) * scale
    tl.store(row_ptr + cols, gradient, mask=mask)


@triton.jit
def _cross_entropy_rows_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    loss_ptr,
    grad_scale_ptr,
    num_classes,
    stride_logits_row,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """loss = logsumexp(u) - u[label], u = logits + bias, and maybe its gradient; a row a program.

    logits_ptr: (M, num_classes), rows stride_logits_row elements apart, overwritten by the gradient
    if there is a scale.  bias_ptr: (num_classes,) or None.  labels_ptr: int64 (M,).  loss_ptr: fp32
    (M,).  grad_scale_ptr: fp32 (1,), or None for the loss alone.  ignore_index: label of rows that
    do not count.  BLOCK_V: classes a step.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_row
    label = tl.load(labels_ptr + row)
    cols = tl.arange(0, BLOCK_V)
    # BERT's 30522 classes are no multiple of 8, and a mask that may end anywhere costs every
    # 16-byte access. So the blocks end at a multiple of 16, and fewer than 16 columns are left.
    aligned = num_classes // 16 * 16
    rest = aligned + tl.arange(0, 16)
    in_rest = rest < num_classes

    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if grad_scale_ptr is not None:
            for start in range(0, aligned, BLOCK_V):
                zeros = tl.zeros([BLOCK_V], tl.float32)
                tl.store(row_ptr + start + cols, zeros, mask=start + cols < aligned)
            tl.store(row_ptr + rest, tl.zeros([16], tl.float32), mask=in_rest)
        return

    valid = (label >= 0) & (label < num_classes)
    target = _logits(row_ptr, bias_ptr, label, valid)

    # Online log-sum-exp. The first maximum is finite: -inf - -inf would be NaN.
    rest_u = _logits(row_ptr, bias_ptr, rest, in_rest)
    rest_largest = tl.maximum(tl.max(rest_u, 0), -3.4e38)
    rest_total = tl.sum(tl.exp(rest_u - rest_largest), 0)
    largest = rest_largest
    total = tl.zeros([BLOCK_V], tl.float32)  # a sum a lane, added up once
    for start in range(0, aligned, BLOCK_V):
        u = _logits(row_ptr, bias_ptr, start + cols, start + cols < aligned)
        updated = tl.maximum(largest, tl.max(u, 0))
        total = total * tl.exp(largest - updated) + tl.exp(u - updated)
        largest = updated
    row_total = tl.sum(total, 0) + rest_total * tl.exp(rest_largest - largest)
    # An invalid label must not pass unseen: loss and gradient of its row become NaN.
    row_total = tl.where(valid, row_total, float("nan"))
    # largest + log(total), the log-sum-exp itself, would lose the digits of a small loss.
    tl.store(loss_ptr + row, largest - target + tl.log(row_total))

    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr)
        inverse = 1.0 / row_total
        for start in range(0, aligned, BLOCK_V):
            block, mask = start + cols, start + cols < aligned
            _store_gradient(row_ptr, bias_ptr, block, mask, largest, inverse, label, scale)
        _store_gradient(row_ptr, bias_ptr, rest, in_rest, largest, inverse, label, scale)


def cross_entropy_rows(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    grad_scale: torch.Tensor | None,
) -> torch.Tensor:
    """loss_m = logsumexp(u_m) - u_m[labels_m], u = logits + bias; 0 where the label is ignored.

    logits: (M, V) fp32, bf16 or fp16, rows of any stride.  bias: (V,) in that dtype or fp32, or
    None.  labels: (M,) int64.  grad_scale: fp32 (1,) or None; if given, logits becomes in place
    (softmax(u) - onehot(label)) grad_scale, 0 for ignored rows.
    Returns loss (M,) fp32. A label outside 0 .. V - 1 that is not ignore_index makes its row NaN.
    One pass over V with an online log-sum-exp (Milakov, Gimelshein, arXiv 1805.02867), a second one
    for the gradient.
    """
    num_rows, num_classes = logits.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return loss
    block_v, num_warps = _config.cross_entropy_rows(num_classes)
    with torch.cuda.device_of(logits):
        _cross_entropy_rows_kernel[(num_rows,)](
            logits,
            bias,
            labels,
            loss,
            grad_scale,
            num_classes,
            logits.stride(0),
            ignore_index,
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
    return loss
