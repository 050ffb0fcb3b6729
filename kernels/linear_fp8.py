"""linear_fp8: a Linear on e4m3 numbers with a scale a row and a scale an output column.

For GPUs with fp8 matrix units: sm_89 and later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config
from fastbert.kernels._tiles import tile_of
from fastbert.kernels.bias_gelu import _gelu


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """scale = max |x| / 448 of each of BLOCK_M whole rows, q = x / scale in e4m3.

    x_ptr, q_ptr: (num_rows, width).  scale_ptr: fp32 (num_rows,).  BLOCK_H: width, padded.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    limit = 448.0 + 0.0 * largest
    inverse = tl.where(largest > 0.0, tl.div_rn(limit, largest), 0.0)
    tl.store(q_ptr + offsets, (x * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows, tl.div_rn(largest, limit), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_fp8_kernel(
    q_ptr,
    scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
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
    """One tile of y = act((q w^T) scale[t] weight_scale[n] + bias[n]).

    q_ptr: e4m3 (num_rows, in_features).  scale_ptr: fp32 (num_rows,).  weight_ptr: e4m3
    (out_features, in_features).  weight_scale_ptr: fp32 (out_features,).  bias_ptr: (out_features,)
    or None.  y_ptr: (num_rows, out_features).  ACTIVATION: 0 none, 1 erf-GELU, 2 tanh-GELU.
    GROUP_M: row tiles that share a column tile while it is in L2.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < num_rows, cols < out_features
    q_ptrs = q_ptr + rows.to(tl.int64)[:, None] * in_features + ks[None, :]
    w_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * in_features + ks[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        left = in_features - start
        q = tl.load(q_ptrs, mask=in_rows[:, None] & (ks < left)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_cols[None, :] & (ks < left)[:, None], other=0.0)
        # Hopper's fp8 units add with 14 bits; so every 128 products go to fp32 sums.
        acc = tl.dot(q, w, acc, max_num_imprecise_acc=128)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + cols, mask=in_cols, other=0.0)
    y = acc * scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:
        y = _gelu(y, False)
    elif ACTIVATION == 2:
        y = _gelu(y, True)
    offsets = rows.to(tl.int64)[:, None] * out_features + cols[None, :]
    tl.store(y_ptr + offsets, y, mask=in_rows[:, None] & in_cols[None, :])


def quantize_rows_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, K) e4m3 and scale (T,) fp32, from x (T, K) contiguous."""
    num_rows, width = x.shape
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale.zero_()
    block_m, block_h, num_warps = _config.layer_norm_fwd(width)
    with torch.cuda.device_of(x):
        _quantize_rows_fp8_kernel[(triton.cdiv(num_rows, block_m),)](
            x, q, scale, num_rows, width, BLOCK_M=block_m, BLOCK_H=block_h, num_warps=num_warps
        )
    return q, scale


def linear_fp8(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y (T, N) in ``dtype``; activation: 0 none, 1 erf-GELU, 2 tanh-GELU.

    q: (T, K) e4m3, scale: (T,) fp32.  weight: (N, K) e4m3, weight_scale: (N,) fp32.  bias: (N,) or
    None. All contiguous.
    """
    num_rows, in_features = q.shape
    out_features = weight.shape[0]
    y = torch.empty(num_rows, out_features, dtype=dtype, device=q.device)
    if y.numel() == 0:
        return y
    tile = _config.linear_fp8(num_rows)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(out_features, tile.block_n),)
    with torch.cuda.device_of(q):
        _linear_fp8_kernel[grid](
            q,
            scale,
            weight,
            weight_scale,
            bias,
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
