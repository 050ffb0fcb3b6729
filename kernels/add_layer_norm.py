"""add_layer_norm: y = LayerNorm(residual + dropout(x + x_bias)), the end of each BERT sub-layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config, _layer_norm, _philox, _quantize, _reduce


@triton.jit(do_not_specialize=["num_rows", "dropout_threshold", "dropout_offset"])
def _add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    q_multiplier_ptr,
    q_ptr,
    q_scale_ptr,
    q_offset_ptr,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    num_rows,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z = residual + dropout(x + x_bias); y = (z - mean) rstd weight + bias; a row block a program.

    x_ptr, residual_ptr (or None), y_ptr, z_ptr (or None): (num_rows, width).
    x_bias_ptr (or None), weight_ptr, bias_ptr: (width,).  mean_ptr, rstd_ptr: fp32 (num_rows,),
    None when z_ptr is.  q_ptr: int8 (num_rows, width), q_scale_ptr, q_offset_ptr: fp32 (num_rows,),
    y times q_multiplier_ptr, fp32 (width,), or y alone where that is None, by
    ``_quantize.quantize_block``; None where nobody wants them.  dropout_seed_ptr: int64 seed, None
    without dropout.  dropout_threshold, dropout_offset, keep_scale: see ``_philox.Dropout``.
    eps: added to the variance.
    BLOCK_M: rows.  BLOCK_H: width padded to a power of two.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_H)
    in_rows = rows < num_rows
    in_width = cols < width
    mask = in_rows[:, None] & in_width[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]

    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + cols, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if dropout_seed_ptr is not None:
        keep = _philox.keep_mask(
            dropout_seed_ptr, dropout_threshold, dropout_offset, 0, rows, 0, BLOCK_H
        )
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Backward reads z as stored, so forward normalises the rounded z too.
    z = z.to(y_ptr.dtype.element_ty)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z, mask=mask)
    z = z.to(tl.float32)

    mean, rstd = _layer_norm.row_statistics(z, in_width, width, eps)
    if z_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=in_rows)
        tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    y = (z - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offsets, y, mask=mask)
    if q_ptr is not None:
        rounded = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # what a reader of y would quantise
        if q_multiplier_ptr is not None:
            rounded *= tl.load(q_multiplier_ptr + cols, mask=in_width, other=0.0)[None, :]
        q, q_scale, q_offset = _quantize.quantize_block(rounded, in_width)
        tl.store(q_ptr + offsets, q, mask=mask)
        tl.store(q_scale_ptr + rows, q_scale, mask=in_rows)
        tl.store(q_offset_ptr + rows, q_offset, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows", "dropout_threshold", "dropout_offset"])
def _add_layer_norm_bwd_kernel(
    dy_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dz_ptr,
    dx_ptr,
    partial_ptr,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    num_rows,
    width,
    NEED_X_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dz, dx, and one row group's shares of dweight, dbias and dx_bias.

    Program g takes row blocks g, g + G, …, G = number of programs.
    dy_ptr, z_ptr, dz_ptr, dx_ptr (None without dropout: dx is dz): (num_rows, width).
    weight_ptr: (width,).  mean_ptr, rstd_ptr: fp32 (num_rows,).
    partial_ptr: fp32 (2 + NEED_X_BIAS, G, width), in the order dweight, dbias, dx_bias.
    dropout_seed_ptr, dropout_threshold, dropout_offset, keep_scale: as in forward.
    NEED_X_BIAS: whether dx_bias is wanted.  BLOCK_M, BLOCK_H: the block of one step.
    """
    cols = tl.arange(0, BLOCK_H)
    in_width = cols < width
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    # Sums stay spread over the block: one reduction across rows at the end instead of one a step.
    dweight = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if NEED_X_BIAS:
        dx_bias = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < num_rows
        mask = in_rows[:, None] & in_width[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)

        normalized = _layer_norm.normalize(z, mean, rstd, in_width)
        dweight += dy * normalized
        dbias += dy
        dz = _layer_norm.input_gradient(dy, normalized, weight, rstd, width)
        tl.store(dz_ptr + offsets, dz, mask=mask)
        dx = dz
        if dropout_seed_ptr is not None:
            keep = _philox.keep_mask(
                dropout_seed_ptr, dropout_threshold, dropout_offset, 0, rows, 0, BLOCK_H
            )
            dx = tl.where(keep, dz * keep_scale, 0.0)
            tl.store(dx_ptr + offsets, dx, mask=mask)
        if NEED_X_BIAS:
            dx_bias += dx

    group = partial_ptr + tl.program_id(0) * width + cols
    stride_sum = tl.num_programs(0) * width
    tl.store(group, tl.sum(dweight, 0), mask=in_width)
    tl.store(group + stride_sum, tl.sum(dbias, 0), mask=in_width)
    if NEED_X_BIAS:
        tl.store(group + 2 * stride_sum, tl.sum(dx_bias, 0), mask=in_width)


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """z = residual + dropout(x + x_bias); y = (z - mean) rstd weight + bias.

    x, residual: (T, H) contiguous fp32, bf16 or fp16.  x_bias, weight, bias: (H,) in x.dtype or
    fp32.  residual and x_bias may be None.  eps, dropout_p: floats.  dropout_seed: int64 (1,) on
    the device, or None.  dropout_offset: the site.  save: also return what backward needs.
    Returns y (T, H), and z (T, H), mean (T,), rstd (T,) fp32, or None for each when not ``save``.
    Mean and variance, in fp32 and two passes, are those of z as rounded to x.dtype.
    """
    num_rows, width = x.shape
    y = torch.empty_like(x)
    z = mean = rstd = None
    if save:
        z = torch.empty_like(x)
        mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
    if num_rows == 0:
        return y, z, mean, rstd
    block_m, block_h, num_warps = _config.layer_norm_fwd(width)
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, block_m),)](
            x,
            residual,
            x_bias,
            weight,
            bias,
            y,
            z,
            mean,
            rstd,
            *(None,) * 4,
            *_philox.dropout_args(dropout_p, dropout_seed, dropout_offset),
            num_rows,
            width,
            eps,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
    return y, z, mean, rstd


def add_layer_norm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    multiplier: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y of ``add_layer_norm_fwd`` without dropout, and its rows in int8: q (T, H), scale and offset
    (T,) fp32, as ``linear_int8.quantize_rows`` makes them of y as rounded to x.dtype, times
    multiplier (H,) fp32 where that is not None."""
    num_rows, width = x.shape
    y, q = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    scale, offset = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return y, q, scale, offset
    block_m, block_h, num_warps = _config.layer_norm_fwd(width)
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, block_m),)](
            x,
            residual,
            x_bias,
            weight,
            bias,
            y,
            *(None,) * 3,
            multiplier,
            q,
            scale,
            offset,
            *_philox.dropout_args(0.0, None, 0),
            num_rows,
            width,
            eps,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
    return y, q, scale, offset


def add_layer_norm_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    need_x_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dz = rstd (g - mean(g) - n mean(g n)), g = dy weight, n = (z - mean) rstd; dx = dropout'(dz).

    dy, z: (T, H) contiguous.  weight: (H,).  mean, rstd: (T,) fp32.  Dropout arguments as in
    forward.  Returns dz and dx (T, H) in z.dtype (one tensor when dropout_p == 0), then (H,) in
    weight.dtype: dweight = sum over rows of dy n, dbias of dy, dx_bias of dx (None when not
    ``need_x_bias``). Sums in fp32 in a fixed order.
    """
    num_rows, width = z.shape
    dz = torch.empty_like(z)
    dx = dz if dropout_p == 0.0 else torch.empty_like(z)
    num_sums = 3 if need_x_bias else 2
    if num_rows == 0:
        sums = [torch.zeros_like(weight) for _ in range(num_sums)]
        return dz, dx, sums[0], sums[1], sums[2] if need_x_bias else None
    block_m, block_h, num_warps = _config.layer_norm_bwd(width, dy.element_size())
    groups = _config.row_groups(triton.cdiv(num_rows, block_m), 1, _config.capability(z))
    partial = torch.empty(num_sums, groups, width, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        _add_layer_norm_bwd_kernel[(groups,)](
            dy,
            z,
            weight,
            mean,
            rstd,
            dz,
            None if dx is dz else dx,
            partial,
            *_philox.dropout_args(dropout_p, dropout_seed, dropout_offset),
            num_rows,
            width,
            NEED_X_BIAS=need_x_bias,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
        sums = _reduce.sum_partials(partial, weight.dtype)
    return dz, dx, sums[0], sums[1], sums[2] if need_x_bias else None
