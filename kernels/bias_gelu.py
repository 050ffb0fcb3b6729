"""bias_gelu: y = gelu(x + bias), the activation between BERT's two feed-forward matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config, _reduce


@triton.jit
def _tanh_gate(u):
    """(1 + tanh(v)) / 2 as sigmoid(2 v), and 2 dv/du, for v = sqrt(2/pi) (u + 0.044715 u^3).

    The sigmoid needs one exp, loses nothing near 0 and saturates without overflow. Past |u| = 30 it
    is exactly 0 or 1, so capping u^2 there keeps both results finite for any finite u.
    """
    u_squared = tl.minimum(u * u, 900.0)
    # 1.5957691216057308 = 2 sqrt(2/pi)
    gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * u * (1.0 + 0.044715 * u_squared)))
    return gate, 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * u_squared)


@triton.jit
def _erf_gate(u):
    """The normal distribution function at u."""
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))  # 1/sqrt(2)


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    if TANH:
        gate, _ = _tanh_gate(u)
    else:
        gate = _erf_gate(u)
    return u * gate


@triton.jit
def _gelu_derivative(u, TANH: tl.constexpr):
    if TANH:
        gate, slope = _tanh_gate(u)
        # In this order a saturated gate makes 0 before anything can overflow.
        derivative = gate + u * (gate * (1.0 - gate)) * slope
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)  # 1/sqrt(2 pi)
        derivative = _erf_gate(u) + u * density
    return derivative


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    width,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = gelu(x + bias) on one tile.

    x_ptr, y_ptr: (num_rows, width).  bias_ptr: (width,) or None.  TANH: the tanh form.
    BLOCK_M, BLOCK_N: the program's tile.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < width, other=0.0)
        u += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, _gelu(u, TANH), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    width,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = dy gelu'(x + bias), and one row group's share of dbias = sum over rows of dx.

    Program (g, c) takes row blocks g, g + G, … of column block c, G = number of row groups.
    dy_ptr, x_ptr, dx_ptr: (num_rows, width).  bias_ptr: (width,) or None.
    partial_ptr: fp32 (G, width), None when bias is.  TANH: the tanh form.
    BLOCK_M, BLOCK_N: the tile of one step.
    """
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = cols < width
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
        dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < num_rows)[:, None] & in_width[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
        u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += bias[None, :]
        dx = dy * _gelu_derivative(u, TANH)
        tl.store(dx_ptr + offsets, dx, mask=mask)
        if bias_ptr is not None:
            dbias += dx
    if bias_ptr is not None:
        partial = partial_ptr + tl.program_id(0) * width + cols
        tl.store(partial, tl.sum(dbias, 0), mask=in_width)


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    """y = gelu(x + bias); erf form u Phi(u), tanh form u (1 + tanh(sqrt(2/pi)(u + .044715 u^3)))/2.

    x: (T, I) contiguous fp32, bf16 or fp16.  bias: (I,) in x.dtype or fp32, or None.
    Returns y (T, I) in x.dtype; computed in fp32 (Hendrycks, Gimpel, arXiv 1606.08415).
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    num_rows, width = x.shape
    block_m, block_n, num_warps = _config.tile(width, x.element_size())
    grid = (triton.cdiv(num_rows, block_m), triton.cdiv(width, block_n))
    with torch.cuda.device_of(x):
        _bias_gelu_fwd_kernel[grid](
            x,
            bias,
            y,
            num_rows,
            width,
            TANH=tanh,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return y


def bias_gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx = dy gelu'(x + bias); dbias = sum over rows of dx, before its rounding.

    dy, x: (T, I) contiguous.  bias: (I,) or None.  Returns dx (T, I) in x.dtype and dbias (I,) in
    bias.dtype, or None without bias. Sums in fp32, in an order that depends on T and I alone.
    """
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    num_rows, width = x.shape
    block_m, block_n, num_warps = _config.bias_gelu_bwd(width)
    column_blocks = triton.cdiv(width, block_n)
    groups = _config.row_groups(
        triton.cdiv(num_rows, block_m), column_blocks, _config.capability(x)
    )
    partial = None
    if bias is not None:
        partial = torch.empty(1, groups, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(groups, column_blocks)](
            dy,
            x,
            bias,
            dx,
            partial,
            num_rows,
            width,
            TANH=tanh,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
        if partial is None or bias is None:
            return dx, None
        return dx, _reduce.sum_partials(partial, bias.dtype)[0]
