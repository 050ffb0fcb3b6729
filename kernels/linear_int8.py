"""linear_int8: an int8 Linear, s8 x s8 -> s32 on the matrix units, and the rows that go into it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config, _quantize
from fastbert.kernels._tiles import tile_of
from fastbert.kernels.bias_gelu import _gelu


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    offset_ptr,
    num_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``_quantize.quantize_block`` of BLOCK_M whole rows.

    x_ptr, q_ptr: (num_rows, width).  scale_ptr, offset_ptr: fp32 (num_rows,).  BLOCK_H: width,
    padded.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    q, scale, offset = _quantize.quantize_block(x, cols < width)
    tl.store(q_ptr + offsets, q, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    tl.store(offset_ptr + rows, offset, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_int8_kernel(
    q_ptr,
    scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    offset_ptr,
    column_sum_ptr,
    output_scale_ptr,
    y_ptr,
    num_rows,
    in_features,
    out_features,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y = act((q w^T) scale[t] weight_scale[n] + offset[t] column_sum[n] + bias[n]).

    q_ptr: int8 (num_rows, in_features).  scale_ptr: fp32 (num_rows,); so offset_ptr, or None.
    weight_ptr: int8 (out_features, in_features).  weight_scale_ptr: fp32 (out_features,); so
    column_sum_ptr, or None.  bias_ptr: (out_features,) or None.  y_ptr: (num_rows, out_features);
    int8, y / output_scale rounded, where output_scale_ptr, fp32 (1,), is not None.
    ACTIVATION: 0 none, 1 erf-GELU, 2 tanh-GELU.  GROUP_M: row tiles that share a column tile while
    it is in L2.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < num_rows, cols < out_features
    q_ptrs = q_ptr + rows.to(tl.int64)[:, None] * in_features + ks[None, :]
    w_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * in_features + ks[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, in_features, BLOCK_K):
        left = in_features - start
        q = tl.load(q_ptrs, mask=in_rows[:, None] & (ks < left)[None, :], other=0)
        w = tl.load(w_ptrs, mask=in_cols[None, :] & (ks < left)[:, None], other=0)
        sums = tl.dot(q, w, sums, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + cols, mask=in_cols, other=0.0)
    y = sums.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    shift = tl.zeros([1, BLOCK_N], tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + rows, mask=in_rows, other=0.0)
        column_sum = tl.load(column_sum_ptr + cols, mask=in_cols, other=0.0)
        y += offset[:, None] * column_sum[None, :] + shift
    else:
        y += shift
    if ACTIVATION == 1:
        y = _gelu(y, False)
    elif ACTIVATION == 2:
        y = _gelu(y, True)
    offsets = rows.to(tl.int64)[:, None] * out_features + cols[None, :]
    mask = in_rows[:, None] & in_cols[None, :]
    if output_scale_ptr is not None:
        y = _quantize.round_to_int8(y * tl.div_rn(1.0, tl.load(output_scale_ptr)))
    tl.store(y_ptr + offsets, y, mask=mask)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (T, K) int8, scale and offset (T,) fp32, from x (T, K) contiguous."""
    num_rows, width = x.shape
    q = torch.empty_like(x, dtype=torch.int8)
    scale, offset = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale.zero_(), offset.zero_()
    block_m, block_h, num_warps = _config.layer_norm_fwd(width)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(triton.cdiv(num_rows, block_m),)](
            x,
            q,
            scale,
            offset,
            num_rows,
            width,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
    return q, scale, offset


def linear_int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    activation: int,
    dtype: torch.dtype,
    output_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (T, N) in ``dtype``; activation: 0 none, 1 erf-GELU, 2 tanh-GELU.

    q: (T, K) int8, scale: (T,) fp32.  weight: (N, K) int8, weight_scale: (N,) fp32.  bias: (N,) or
    None.  offset: (T,) and column_sum: (N,) fp32, or None.  output_scale: (1,) fp32, by which y is
    divided, rounded and stored in int8 instead, or None. All contiguous.
    """
    num_rows, in_features = q.shape
    out_features = weight.shape[0]
    stored = dtype if output_scale is None else torch.int8
    y = torch.empty(num_rows, out_features, dtype=stored, device=q.device)
    if y.numel() == 0:
        return y
    tile = _config.linear_int8(num_rows, _config.capability(q))
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(out_features, tile.block_n),)
    with torch.cuda.device_of(q):
        _linear_int8_kernel[grid](
            q,
            scale,
            weight,
            weight_scale,
            bias,
            offset,
            column_sum,
            output_scale,
            y,
            num_rows,
            in_features,
            out_features,
            ACTIVATION=activation,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=_config.GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y
