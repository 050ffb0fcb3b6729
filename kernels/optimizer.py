"""Multi-tensor AdamW and LAMB: one launch updates every parameter of a model.

A program updates one chunk of one tensor, which it finds in a table on the device. The step
counter, the learning rate and the scale of the gradients are read through pointers, so that a
recorded CUDA graph takes their values of the moment. Nothing is read on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastbert.kernels._optimizer import (
    BLOCK,
    CHUNK,
    COLUMNS,
    COPY,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_CHUNK,
    GRAD,
    LR,
    NUM_WARPS,
    NUMEL,
    PARAM,
    Table,
    address,
    corrections,
    direction,
    load,
    locate,
    scalar,
    tabulate,
    update_moments,
)

__all__ = ["Table", "adamw_step", "lamb_step", "tabulate"]

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- AdamW -------------------------------------------------------------------------------------


@triton.jit
def _adamw_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, mask,
    grad_scale, beta1, beta2, weight1, weight2, eps, lr, decay, correction1, correction2,
):  # fmt: skip
    m, v = update_moments(
        grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask,
        grad_scale, beta1, beta2, weight1, weight2,
    )  # fmt: skip
    p = load(param_ptr + offsets, mask)
    p = p * (1.0 - lr * decay) - lr * direction(m, v, correction1, correction2, eps)
    tl.store(param_ptr + offsets, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, p, mask=mask)


@triton.jit
def _adamw_kernel(
    rows_ptr,
    decays_ptr,
    chunks_ptr,
    grad_scale_ptr,
    beta1,
    beta2,
    weight1,
    weight2,
    log_beta1,
    log_beta2,
    eps,
    BIAS_CORRECTION: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p = p (1 - lr decay) - lr m / (sqrt(v) + eps) on one chunk, m and v the new moments.

    rows_ptr, decays_ptr, chunks_ptr: see Table.  grad_scale_ptr: fp32 (1,), what the gradients are
    divided by, or None.  weight1, weight2: 1 - beta1 and 1 - beta2, computed in double: an fp32
    .999 is not precise enough to be taken from 1.  log_beta1, log_beta2: natural logarithms.
    COPY_TYPE: None without copies.  CHUNK, BLOCK: elements a program, and at once.
    """
    tensor, row, start, whole, end = locate(rows_ptr, chunks_ptr, CHUNK, BLOCK)
    param_ptr = address(row, PARAM, tl.float32, ALIGNED)
    grad_ptr = address(row, GRAD, GRAD_TYPE, ALIGNED)
    exp_avg_ptr = address(row, EXP_AVG, tl.float32, ALIGNED)
    exp_avg_sq_ptr = address(row, EXP_AVG_SQ, tl.float32, ALIGNED)
    copy_ptr = None
    if COPY_TYPE is not None:
        copy_ptr = address(row, COPY, COPY_TYPE, ALIGNED)
    lr = scalar(row, LR)
    decay = tl.load(decays_ptr + tensor)
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    correction1, correction2 = corrections(row, log_beta1, log_beta2, BIAS_CORRECTION)
    # Whole blocks without a mask: only those become 16-byte accesses.
    for first in range(start, whole, BLOCK):
        _adamw_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr,
            first + tl.arange(0, BLOCK), None,
            grad_scale, beta1, beta2, weight1, weight2, eps, lr, decay, correction1, correction2,
        )  # fmt: skip
    if whole < end:
        offsets = whole + tl.arange(0, BLOCK)
        _adamw_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, offsets < end,
            grad_scale, beta1, beta2, weight1, weight2, eps, lr, decay, correction1, correction2,
        )  # fmt: skip


# --- LAMB --------------------------------------------------------------------------------------


@triton.jit
def _lamb_moments_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask,
    grad_scale, beta1, beta2, weight1, weight2, eps, decay, correction1, correction2,
):  # fmt: skip
    """p^2 and u^2 of the block; both 0 where it is masked, as are the p, m and v loaded there."""
    m, v = update_moments(
        grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask,
        grad_scale, beta1, beta2, weight1, weight2,
    )  # fmt: skip
    p = load(param_ptr + offsets, mask)
    u = direction(m, v, correction1, correction2, eps) + decay * p
    return p * p, u * u


@triton.jit(do_not_specialize=["num_chunks"])
def _lamb_moments_kernel(
    rows_ptr,
    decays_ptr,
    chunks_ptr,
    grad_scale_ptr,
    partial_ptr,
    num_chunks,
    beta1,
    beta2,
    weight1,
    weight2,
    log_beta1,
    log_beta2,
    eps,
    BIAS_CORRECTION: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new moments of one chunk, and its share of |p|^2 and of |u|^2, where
    u = m / (sqrt(v) + eps) + decay p.

    partial_ptr: fp32 (2, num_chunks).  The rest as in ``_adamw_kernel``.
    """
    tensor, row, start, whole, end = locate(rows_ptr, chunks_ptr, CHUNK, BLOCK)
    param_ptr = address(row, PARAM, tl.float32, ALIGNED)
    grad_ptr = address(row, GRAD, GRAD_TYPE, ALIGNED)
    exp_avg_ptr = address(row, EXP_AVG, tl.float32, ALIGNED)
    exp_avg_sq_ptr = address(row, EXP_AVG_SQ, tl.float32, ALIGNED)
    decay = tl.load(decays_ptr + tensor)
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    correction1, correction2 = corrections(row, log_beta1, log_beta2, BIAS_CORRECTION)
    p_sum = tl.zeros([BLOCK], tl.float32)
    u_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(start, whole, BLOCK):
        p_squared, u_squared = _lamb_moments_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, first + tl.arange(0, BLOCK), None,
            grad_scale, beta1, beta2, weight1, weight2, eps, decay, correction1, correction2,
        )  # fmt: skip
        p_sum += p_squared
        u_sum += u_squared
    if whole < end:
        offsets = whole + tl.arange(0, BLOCK)
        p_squared, u_squared = _lamb_moments_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, offsets < end,
            grad_scale, beta1, beta2, weight1, weight2, eps, decay, correction1, correction2,
        )  # fmt: skip
        p_sum += p_squared
        u_sum += u_squared
    tl.store(partial_ptr + tl.program_id(0), tl.sum(p_sum, 0))
    tl.store(partial_ptr + num_chunks + tl.program_id(0), tl.sum(u_sum, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def _sum_chunks_kernel(
    rows_ptr, partial_ptr, sums_ptr, num_chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[k, n] = sum of partial[k, c] over the chunks c of tensor n, in one fixed order.

    Program (n, k).  rows_ptr: see Table.  partial_ptr: fp32 (2, num_chunks).
    sums_ptr: fp32 (2, number of tensors).  CHUNK: elements of a chunk.  BLOCK: chunks at once.
    """
    row = rows_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.load(row + FIRST_CHUNK)
    end = first + tl.cdiv(tl.load(row + NUMEL), CHUNK)
    base = partial_ptr + tl.program_id(1) * num_chunks
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        chunks = start + tl.arange(0, BLOCK)
        total += tl.load(base + chunks, mask=chunks < end, other=0.0)
    sums = sums_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums, tl.sum(total, 0))


@triton.jit
def _lamb_apply_block(
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, mask,
    eps, rate, decay, correction1, correction2,
):  # fmt: skip
    p = load(param_ptr + offsets, mask)
    m = load(exp_avg_ptr + offsets, mask)
    v = load(exp_avg_sq_ptr + offsets, mask)
    p -= rate * (direction(m, v, correction1, correction2, eps) + decay * p)
    tl.store(param_ptr + offsets, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, p, mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _lamb_apply_kernel(
    rows_ptr,
    decays_ptr,
    chunks_ptr,
    sums_ptr,
    num_tensors,
    log_beta1,
    log_beta2,
    eps,
    BIAS_CORRECTION: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p -= lr ratio u on one chunk; ratio = |p| / |u|, but 1 if either is 0 or decay is.

    sums_ptr: fp32 (2, num_tensors), |p|^2 and |u|^2.  The rest as in ``_adamw_kernel``. u is
    computed again from the moments: that moves as many bytes as keeping it, and needs no memory.
    """
    tensor, row, start, whole, end = locate(rows_ptr, chunks_ptr, CHUNK, BLOCK)
    param_ptr = address(row, PARAM, tl.float32, ALIGNED)
    exp_avg_ptr = address(row, EXP_AVG, tl.float32, ALIGNED)
    exp_avg_sq_ptr = address(row, EXP_AVG_SQ, tl.float32, ALIGNED)
    copy_ptr = None
    if COPY_TYPE is not None:
        copy_ptr = address(row, COPY, COPY_TYPE, ALIGNED)
    decay = tl.load(decays_ptr + tensor)
    p_norm = tl.sqrt(tl.load(sums_ptr + tensor))
    u_norm = tl.sqrt(tl.load(sums_ptr + num_tensors + tensor))
    # "is not 0", so that a norm that is nan reaches the parameters, as it does in the reference.
    trusted = (decay != 0.0) & (p_norm != 0.0) & (u_norm != 0.0)
    rate = scalar(row, LR) * tl.where(trusted, p_norm / tl.where(trusted, u_norm, 1.0), 1.0)
    correction1, correction2 = corrections(row, log_beta1, log_beta2, BIAS_CORRECTION)
    for first in range(start, whole, BLOCK):
        _lamb_apply_block(
            param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, first + tl.arange(0, BLOCK), None,
            eps, rate, decay, correction1, correction2,
        )  # fmt: skip
    if whole < end:
        offsets = whole + tl.arange(0, BLOCK)
        _lamb_apply_block(
            param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, offsets < end,
            eps, rate, decay, correction1, correction2,
        )  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------


def adamw_step(
    tables: Sequence[Table],
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    grad_scale: torch.Tensor | None,
) -> None:
    """AdamW's update of every tensor of ``tables``, in place; the equations are the op's.

    grad_scale: fp32 of one element on the tables' device, or None.
    """
    for table in tables:
        if not len(table.chunks):
            continue
        with torch.cuda.device_of(table.rows):
            _adamw_kernel[(len(table.chunks),)](
                table.rows,
                table.decays,
                table.chunks,
                grad_scale,
                *_averages(betas),
                *_logarithms(betas),
                eps,
                BIAS_CORRECTION=bias_correction,
                GRAD_TYPE=_TYPES[table.grad],
                COPY_TYPE=_copy_type(table),
                **_common(table),
            )


def lamb_step(
    tables: Sequence[Table],
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    grad_scale: torch.Tensor | None,
    all_reduce: Callable[[torch.Tensor], None] | None,
) -> None:
    """LAMB's update of every tensor of ``tables``, in place; the equations are the op's.

    The squared norms are sums over chunks, then over the chunks of a tensor, each in an order that
    depends on its size alone: the same inputs give the same bits.
    all_reduce: adds up, in place, the squared norms (2, n) of the ranks that hold the other shards
    of the tensors; None where tensors are whole.
    """
    for table in tables:
        num_tensors, num_chunks = len(table.rows), len(table.chunks)
        partial = torch.empty(2, num_chunks, dtype=torch.float32, device=table.rows.device)
        sums = torch.empty(2, num_tensors, dtype=torch.float32, device=table.rows.device)
        with torch.cuda.device_of(table.rows):
            if num_chunks:
                _lamb_moments_kernel[(num_chunks,)](
                    table.rows,
                    table.decays,
                    table.chunks,
                    grad_scale,
                    partial,
                    num_chunks,
                    *_averages(betas),
                    *_logarithms(betas),
                    eps,
                    BIAS_CORRECTION=bias_correction,
                    GRAD_TYPE=_TYPES[table.grad],
                    **_common(table),
                )
            _sum_chunks_kernel[(num_tensors, 2)](
                table.rows, partial, sums, num_chunks, CHUNK=CHUNK, BLOCK=256, num_warps=4
            )
            if all_reduce is not None:
                all_reduce(sums)
            if num_chunks:
                _lamb_apply_kernel[(num_chunks,)](
                    table.rows,
                    table.decays,
                    table.chunks,
                    sums,
                    num_tensors,
                    *_logarithms(betas),
                    eps,
                    BIAS_CORRECTION=bias_correction,
                    COPY_TYPE=_copy_type(table),
                    **_common(table),
                )


def _averages(betas: tuple[float, float]) -> tuple[float, ...]:
    return *betas, 1.0 - betas[0], 1.0 - betas[1]


def _logarithms(betas: tuple[float, float]) -> tuple[float, ...]:
    """Those of the betas; beta = 0 keeps nothing of the past, and 0^step is 0 from step 1 on."""
    return tuple(math.log(beta) if beta else -math.inf for beta in betas)


def _copy_type(table: Table) -> Any:
    return None if table.copy is None else _TYPES[table.copy]


def _common(table: Table) -> dict[str, Any]:
    return {"ALIGNED": table.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
