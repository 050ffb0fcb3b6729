"""The feed-forward's products with GELU in their epilogues, for where BLAS and bias_gelu lose.

Forward: pre = x w1^T and y = gelu(pre + b1). Backward: dpre = (dy w2) gelu'(pre + b1), the gradient
of the second product's input taken back through GELU, with db1 and, for dw2, y once more. Each half
saves passes over (T, I), the widest activation of a layer. Passes over it:

              BLAS and bias_gelu                         in the epilogue   saved
    forward   write pre; read it, write y                write pre and y   1 of 3
    backward  write dy w2; read it and pre, write dpre;  read pre,         3 of 6
              read pre, write y                          write dpre and y

pre is kept, not computed again: the product takes 6.0 ns a token of BERT-base at 790 TFLOP/s, to
write and read pre 2.9 ns at 4.3 TB/s. By the same figures fusion pays where the product runs at 81%
of BLAS's rate in forward, at 58% in backward.

From sm_90 on, tiles move through tensor descriptors, by the copy engine, and programs are
persistent: each takes every P-th output tile, so that the operands of the next tile come while the
epilogue of the last one computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels import _config, _reduce
from fastbert.kernels._tiles import tile_of
from fastbert.kernels.bias_gelu import _gelu, _gelu_derivative


@triton.jit
def _columns(vector_ptr, cols, width):
    """Elements ``cols`` of a vector (width,) in fp32, as a row, 0 past its end."""
    return tl.load(vector_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load(
    x, row, col, num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """The tile of ROWS x COLS at (row, col) of x, a descriptor or a pointer; 0 past its edges."""
    if DESCRIPTORS:
        tile = x.load([row, col])
    else:
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _store(x, tile, row, col, num_rows, width, DESCRIPTORS: tl.constexpr):
    """Counterpart of ``_load``."""
    if DESCRIPTORS:
        x.store([row, col], tile.to(x.dtype))
    else:
        rows, cols = row + tl.arange(0, tile.shape[0]), col + tl.arange(0, tile.shape[1])
        mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
        tl.store(x + rows.to(tl.int64)[:, None] * width + cols[None, :], tile, mask=mask)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _split(tile, PARTS: tl.constexpr):
    """A tile's columns in PARTS (1, 2, 4 or 8) parts, from left to right."""
    if PARTS == 1:
        parts = (tile,)
    else:
        parts = _halves(tile)
        if PARTS > 2:
            parts = _halves(parts[0]) + _halves(parts[1])
        if PARTS > 4:
            parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
    return parts


@triton.jit
def _finish_fwd(
    acc, y, pre, bias_ptr, row, col, num_rows, width, TANH: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    if pre is not None:
        _store(pre, acc, row, col, num_rows, width, DESCRIPTORS)
    if bias_ptr is not None:
        acc += _columns(bias_ptr, col + tl.arange(0, acc.shape[1]), width)
    _store(y, _gelu(acc, TANH), row, col, num_rows, width, DESCRIPTORS)


@triton.jit(do_not_specialize=["num_rows"])
def _feed_forward_fwd_kernel(
    x,
    w,
    y,
    pre,
    bias_ptr,
    num_rows,
    in_features,
    out_features,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """pre = x w^T and y = gelu(pre + bias), program p on output tiles p, p + P, ….

    x: (num_rows, in_features) by (BLOCK_M, BLOCK_K).  w: (out_features, in_features) by (BLOCK_N,
    BLOCK_K).  y, pre: (num_rows, out_features), the second None when nobody wants it. Each a
    descriptor of such tiles, or a pointer.  bias_ptr: (out_features,) or None.  TANH: the tanh
    form.  PARTS: the epilogue takes a tile in so many parts, and y and pre are described by them.
    DESCRIPTORS: whether they are descriptors; then one loop goes over all tiles' steps.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    for index in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS
    ):
        row_tile, column_tile = tile_of(index, row_tiles, column_tiles, GROUP_M)
        row, col = row_tile * BLOCK_M, column_tile * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            a = _load(x, row, start, num_rows, in_features, BLOCK_M, BLOCK_K, DESCRIPTORS)
            b = _load(w, col, start, out_features, in_features, BLOCK_N, BLOCK_K, DESCRIPTORS)
            acc = tl.dot(a, b.T, acc)
        parts = _split(acc, PARTS)
        for i in tl.static_range(PARTS):
            part = col + i * (BLOCK_N // PARTS)
            _finish_fwd(
                parts[i], y, pre, bias_ptr, row, part, num_rows, out_features, TANH, DESCRIPTORS
            )


@triton.jit
def _finish_bwd(
    acc,
    pre,
    dpre,
    y,
    bias_ptr,
    partial_ptr,
    row,
    col,
    num_rows,
    width,
    TANH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    cols = col + tl.arange(0, acc.shape[1])
    u = _load(pre, row, col, num_rows, width, acc.shape[0], acc.shape[1], DESCRIPTORS).to(
        tl.float32
    )
    if bias_ptr is not None:
        u += _columns(bias_ptr, cols, width)
    if y is not None:
        _store(y, _gelu(u, TANH), row, col, num_rows, width, DESCRIPTORS)
    # Rows past the end have dy = 0, hence dpre = 0.
    grad = acc * _gelu_derivative(u, TANH)
    _store(dpre, grad, row, col, num_rows, width, DESCRIPTORS)
    if bias_ptr is not None:
        row_tile = (row // acc.shape[0]).to(tl.int64)
        tl.store(partial_ptr + row_tile * width + cols, tl.sum(grad, 0), mask=cols < width)


@triton.jit(do_not_specialize=["num_rows"])
def _feed_forward_bwd_kernel(
    dy,
    w,
    pre,
    dpre,
    y,
    bias_ptr,
    partial_ptr,
    num_rows,
    in_features,
    out_features,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dpre = (dy w) gelu'(pre + bias), y = gelu(pre + bias), and each row tile's share of dbias =
    sum over rows of dpre; program p on tiles p, p + P, ….

    dy: (num_rows, in_features) by (BLOCK_M, BLOCK_K).  w: (in_features, out_features) by (BLOCK_K,
    BLOCK_N).  pre, dpre, y: (num_rows, out_features), the last None when nobody wants it. Each a
    descriptor of such tiles, or a pointer.  bias_ptr: (out_features,) or None.  partial_ptr: fp32
    (row tiles, out_features), None when bias is.  TANH, PARTS, DESCRIPTORS: as in forward.
    """
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    for index in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS
    ):
        row_tile, column_tile = tile_of(index, row_tiles, column_tiles, GROUP_M)
        row, col = row_tile * BLOCK_M, column_tile * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            a = _load(dy, row, start, num_rows, in_features, BLOCK_M, BLOCK_K, DESCRIPTORS)
            b = _load(w, start, col, in_features, out_features, BLOCK_K, BLOCK_N, DESCRIPTORS)
            acc = tl.dot(a, b, acc)
        parts = _split(acc, PARTS)
        for i in tl.static_range(PARTS):
            _finish_bwd(
                parts[i], pre, dpre, y, bias_ptr, partial_ptr, row, col + i * (BLOCK_N // PARTS),
                num_rows, out_features, TANH, DESCRIPTORS,
            )  # fmt: skip


def feed_forward_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, tanh: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = gelu(x w1^T + b1) and, when ``save``, pre = x w1^T, else None.

    x: (T, H), w1: (I, H), bf16 or fp16, contiguous, addresses and H and I multiples of 16 bytes:
    what tensor descriptors describe.  b1: (I,) in x.dtype or fp32, or None.
    Returns (T, I) in x.dtype. Sums and GELU in fp32: y is gelu of pre before its rounding.
    """
    num_rows, in_features = x.shape
    out_features = w1.shape[0]
    y = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if save else None
    if y.numel() == 0:
        return y, pre
    tile = _config.feed_forward("fwd", _config.capability(x))
    with torch.cuda.device_of(x):
        _feed_forward_fwd_kernel[_grid(y, tile)](
            _operand(x, tile.block_m, tile.block_k, tile),
            _operand(w1, tile.block_n, tile.block_k, tile),
            _operand(y, tile.block_m, tile.block_n // tile.parts, tile),
            _operand(pre, tile.block_m, tile.block_n // tile.parts, tile),
            b1,
            num_rows,
            in_features,
            out_features,
            TANH=tanh,
            **_tile_args(tile),
        )
    return y, pre


def feed_forward_bwd(
    dy: torch.Tensor,
    w2: torch.Tensor,
    pre: torch.Tensor,
    b1: torch.Tensor | None,
    tanh: bool,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dpre = (dy w2) gelu'(pre + b1); db1 = sum over rows of dpre, before its rounding; and, when
    ``need_y``, y = gelu(pre + b1), which dw2 = dy^T y wants.

    dy: (T, H), w2: (H, I), pre: (T, I), as ``feed_forward_fwd`` wants them.  b1: (I,) or None.
    Returns dpre (T, I) in dy.dtype, db1 (I,) in b1.dtype or None, y (T, I) or None. Sums in fp32,
    db1's in an order that depends on T and I alone.
    """
    num_rows, in_features = dy.shape
    out_features = w2.shape[1]
    dpre = torch.empty_like(pre)
    y = torch.empty_like(pre) if need_y else None
    if dpre.numel() == 0:
        return dpre, None if b1 is None else torch.zeros_like(b1), y
    tile = _config.feed_forward("bwd", _config.capability(dy))
    partial = None
    if b1 is not None:
        row_tiles = triton.cdiv(num_rows, tile.block_m)
        partial = torch.empty(1, row_tiles, out_features, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _feed_forward_bwd_kernel[_grid(dpre, tile)](
            _operand(dy, tile.block_m, tile.block_k, tile),
            _operand(w2, tile.block_k, tile.block_n, tile),
            _operand(pre, tile.block_m, tile.block_n // tile.parts, tile),
            _operand(dpre, tile.block_m, tile.block_n // tile.parts, tile),
            _operand(y, tile.block_m, tile.block_n // tile.parts, tile),
            b1,
            partial,
            num_rows,
            in_features,
            out_features,
            TANH=tanh,
            **_tile_args(tile),
        )
        if partial is None or b1 is None:
            return dpre, None, y
        return dpre, _reduce.sum_partials(partial, b1.dtype)[0], y


def _operand(
    x: torch.Tensor | None, rows: int, columns: int, tile: _config.FeedForwardTile
) -> torch.Tensor | TensorDescriptor | None:
    """``x`` as the kernels take it: described by tiles of (rows, columns), or as it is."""
    if x is None or not tile.descriptors:
        return x
    return TensorDescriptor.from_tensor(x, [rows, columns])


def _grid(output: torch.Tensor, tile: _config.FeedForwardTile) -> tuple[int]:
    rows, columns = output.shape
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    if not tile.descriptors:
        return (tiles,)
    return (_config.persistent_programs(tiles, _config.capability(output)),)


def _tile_args(tile: _config.FeedForwardTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": _config.GROUP_M,
        "PARTS": tile.parts,
        "DESCRIPTORS": tile.descriptors,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
