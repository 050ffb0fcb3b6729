"""What the attention kernels share: a program's place in the packed tokens, tiles, arguments.

Layout: ``qkv`` is (T, 3, N, D), so one token's query, key and value rows lie in one row of
3 N D elements, and a head's tile is read in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention_config, _attention_tile_list, _config


@triton.jit
def find_tile(cu_seqlens_ptr, tile_list_ptr, tiles_per_sequence, num_heads):
    """This program's sequence: its first token (int64) and length; the tile in it; and the head.

    tile_list_ptr: of ``_attention_tile_list``, or None: see ``tiling``.
    """
    if tile_list_ptr is None:
        sequence = tl.program_id(0) // tiles_per_sequence
        tile = tl.program_id(0) % tiles_per_sequence
        first = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first
        return first.to(tl.int64), length, tile, tl.program_id(1)
    else:
        first, length, tile, head = listed_tile(tile_list_ptr, num_heads)
        return first, length, tile, head


@triton.jit
def listed_tile(tile_list_ptr, num_heads, AGAIN: tl.constexpr = False):
    """``find_tile`` by the list: program place * num_heads + head, so that all heads of a long tile
    start before a short one.

    AGAIN: read once more, after a loop without registers for it. As they come a place follows from
    the program's number, which a warp has once; what a list says each thread has.
    """
    entry = tile_list_ptr + tl.program_id(0) // num_heads * 3
    first = tl.load(entry, volatile=AGAIN)
    # A length in place of the end makes the one-pass backward with dropout spill on sm_90.
    length = tl.load(entry + 1, volatile=AGAIN) - first
    tile = tl.load(entry + 2, volatile=AGAIN)
    return first.to(tl.int64), length, tile, tl.program_id(0) % num_heads


@triton.jit
def load_tile(ptr, rows, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head as a (rows, BLOCK_D) tile, 0 past the sequence's end and past HEAD_DIM.

    ptr: the sequence's first row.  rows: (BLOCK,) positions.  stride_row: elements between rows.
    """
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride_row + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, x, rows, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Counterpart of ``load_tile``."""
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride_row + dims[None, :], x, mask=mask)


@triton.jit
def load_bias(ptr, queries, keys, length, width):
    """The bias of a tile of scores in units of log2, fp32, 0 past the sequence's end.

    ptr: the row of the sequence's first query, for this head.  queries, keys: positions, of shapes
    that broadcast to the tile.  width: elements of a row.
    """
    mask = (queries < length) & (keys < length)
    bias = tl.load(ptr + queries * width + keys, mask=mask, other=0.0)
    return bias.to(tl.float32) * 1.4426950408889634  # log2(e)


def bias_args(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """The three bias arguments of a kernel, of bias (1 or N, T, W): it, the elements from one head
    to the next (0: all heads share it) and W."""
    if bias is None:
        return None, 0, 0
    return bias, bias.stride(0) if bias.shape[0] > 1 else 0, bias.shape[2]


def kind(
    qkv: torch.Tensor,
    dropout_p: float,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> tuple[int, int, bool, tuple[int, int], bool, bool]:
    """What the launch choices of ``_config`` depend on."""
    arch = _config.capability(qkv)
    return (
        qkv.shape[3], qkv.element_size(), dropout_p > 0.0, arch, bias is not None, mask is not None,
    )  # fmt: skip


class Tiling(NamedTuple):
    """grid: of programs.  tile_list, tiles_per_sequence: what ``find_tile`` finds places by."""

    grid: tuple[int, ...]
    tile_list: torch.Tensor | None
    tiles_per_sequence: int


def tiling(
    cu_seqlens: torch.Tensor,
    num_tokens: int,
    max_seqlen: int,
    num_heads: int,
    block: int,
    longest_first: bool = False,
) -> Tiling:
    """A program for each tile of ``block`` tokens and head.

    As the sequences come, or longest first by a list. As they come each has the tiles of the
    longest, and programs past its end return at once.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    if longest_first:
        places = _attention_tile_list.tile_list(cu_seqlens, num_tokens, block)
        return Tiling((places.shape[0] * num_heads,), places, 1)
    tiles_per_sequence = triton.cdiv(max_seqlen, block)
    return Tiling((tiles_per_sequence * num_sequences, num_heads), None, tiles_per_sequence)


def longest_first(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> bool:
    """The choice of ``_attention_config`` for these arguments of an attention."""
    sizes = qkv.shape[0], cu_seqlens.shape[0] - 1, max_seqlen, qkv.element_size()
    return _attention_config.longest_first(*sizes)


def tile_args(head_dim: int, tile: _attention_config.Tile) -> dict[str, int]:
    """The keyword arguments by which a kernel gets its tile."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
