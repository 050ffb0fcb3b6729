"""gather_rows and scatter_rows: move rows of a matrix by an ascending index."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config


@triton.jit(do_not_specialize=["num_indices", "num_rows"])
def _gather_rows_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    num_indices,
    num_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[m] = x[index[m]], or 0 where index[m] is out of range.

    x_ptr: (num_rows, width).  index_ptr: int64 (num_indices,).  out_ptr: (num_indices, width).
    BLOCK_M, BLOCK_N: the program's tile of out.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_indices
    source = tl.load(index_ptr + rows, mask=in_rows, other=-1)
    in_width = (cols < width)[None, :]
    valid = ((source >= 0) & (source < num_rows))[:, None] & in_width
    x = tl.load(x_ptr + source[:, None] * width + cols[None, :], mask=valid, other=0.0)
    out = out_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out, x, mask=in_rows[:, None] & in_width)


@triton.jit(do_not_specialize=["num_indices", "num_rows"])
def _scatter_rows_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    num_indices,
    num_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[index[m]] = x[m]; an index out of range writes nothing.

    x_ptr: (num_indices, width).  index_ptr: int64 (num_indices,).  out_ptr: (num_rows, width),
    zeroed.  BLOCK_M, BLOCK_N: the program's tile of x.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_indices
    target = tl.load(index_ptr + rows, mask=in_rows, other=-1)
    valid = ((target >= 0) & (target < num_rows))[:, None] & (cols < width)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=valid, other=0.0)
    tl.store(out_ptr + target[:, None] * width + cols[None, :], x, mask=valid)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """y[m] = x[index[m]].

    x: (R, H) contiguous, any dtype.  index: (M,) int64, strictly ascending.  Returns (M, H).
    A row whose index is out of range is 0.
    """
    out = torch.empty(index.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        _launch(_gather_rows_kernel, x, index, out, x.shape[0])
    return out


def scatter_rows(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """y[index[m]] = x[m], all other rows 0.

    x: (M, H) contiguous, any dtype.  index: (M,) int64, strictly ascending.  Returns (num_rows, H).
    A row whose index is out of range goes nowhere.
    """
    out = torch.zeros(num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    if x.numel() > 0 and num_rows > 0:
        _launch(_scatter_rows_kernel, x, index, out, num_rows)
    return out


def _launch(kernel, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor, num_rows: int) -> None:
    num_indices, width = index.shape[0], x.shape[1]
    block_m, block_n, num_warps = _config.tile(width, x.element_size())
    grid = (triton.cdiv(num_indices, block_m), triton.cdiv(width, block_n))
    with torch.cuda.device_of(x):
        kernel[grid](
            x,
            index,
            out,
            num_indices,
            num_rows,
            width,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
