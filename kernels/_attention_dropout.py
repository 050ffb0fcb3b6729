"""Attention's dropout: drawn in the kernels, or read from a packed mask that is drawn once.

The mask is int32 (N, T, W): row = packed index of the query, bit b of word w = the key at position
32 w + b of its sequence, set where the probability is kept. Its bits are those of ``_philox``, so
the results are the same to the last bit. W is a multiple of 4: a row is whole 16-byte accesses, and
a tile of up to 128 keys never reaches past it. Words past a sequence's end may hold anything: there
the probabilities are 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention, _attention_config, _philox


@triton.jit
def keep_tile(
    seed_ptr,
    threshold,
    offset,
    mask_ptr,
    mask_quads,
    head,
    first,
    queries,
    length,
    num_tokens,
    first_key,
    BLOCK_N: tl.constexpr,
):
    """Which probabilities of a tile survive dropout: int1 (queries, BLOCK_N).

    seed_ptr, threshold, offset, mask_ptr, mask_quads: see ``dropout_args``.  first, length: of the
    sequence, in tokens.  queries: (BLOCK_M,) positions.  first_key: position of the tile's left
    edge, a multiple of BLOCK_N.
    """
    if mask_ptr is None:
        rows = first.to(tl.int32) + queries
        return _philox.keep_mask(seed_ptr, threshold, offset, head, rows, first_key, BLOCK_N)
    else:
        row_ptr = mask_ptr + (head.to(tl.int64) * num_tokens + first) * (4 * mask_quads)
        return _unpack(row_ptr, queries, length, 4 * mask_quads, first_key, BLOCK_N)


@triton.jit
def _unpack(ptr, queries, length, width, first_key, BLOCK_N: tl.constexpr):
    """``keep_tile`` of the mask.  ptr: the row of the sequence's first query, ``width`` words."""
    WORDS: tl.constexpr = (BLOCK_N + 31) // 32
    BITS: tl.constexpr = BLOCK_N // WORDS
    columns = first_key // 32 + tl.arange(0, WORDS)
    mask = (queries < length)[:, None]
    words = tl.load(ptr + queries[:, None] * width + columns[None, :], mask=mask, other=0)
    if BLOCK_N < 32:
        words = words >> first_key % 32
    # A thread of the matrix units has the columns 8 i + 2 t + j of a row, t its place among four
    # threads: after one shift by 2 t, each bit it looks for is at a place known when compiled.
    i = tl.arange(0, BITS // 8)[None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None]
    j = tl.arange(0, 2)[None, None, None, None, :]
    shifted = words[:, :, None, None, None] >> 2 * t
    keep = (shifted & (1 << (8 * i + j))) != 0
    return keep.reshape(queries.shape[0], BLOCK_N)


def dropout_args(
    p: float, seed: torch.Tensor | None, offset: int, mask: torch.Tensor | None
) -> tuple[Any, ...]:
    """The six dropout arguments of an attention kernel: ``_philox.Dropout``, the mask or None for
    Philox in the kernel, and a fourth of the words of its rows."""
    quads = 0 if mask is None else mask.shape[2] // 4
    return *_philox.dropout_args(p, seed, offset), mask, quads


@triton.jit(do_not_specialize=["num_tokens", "tiles_per_sequence", "threshold", "offset"])
def _attention_dropout_mask_kernel(
    mask_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    threshold,
    offset,
    num_tokens,
    mask_quads,
    tiles_per_sequence,
    BLOCK_M: tl.constexpr,
):
    """The rows of BLOCK_M queries of one head; program (sequence and tile, head).

    mask_ptr: int32 (N, num_tokens, 4 mask_quads).  cu_seqlens_ptr, tiles_per_sequence: as in
    forward.  seed_ptr, threshold, offset: see ``_philox.Dropout``.
    """
    first, length, tile, head = _attention.find_tile(cu_seqlens_ptr, None, tiles_per_sequence, 0)
    if tile * BLOCK_M >= length:
        return
    width = 4 * mask_quads
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first.to(tl.int32) + queries
    row_ptr = mask_ptr + (head.to(tl.int64) * num_tokens + first) * width
    for first_word in range(0, tl.cdiv(length, 32), 4):
        words = _philox.keep_words(seed_ptr, threshold, offset, head, rows, first_word, 4)
        columns = first_word + tl.arange(0, 4)
        mask = (queries < length)[:, None]
        tl.store(row_ptr + queries[:, None] * width + columns[None, :], words, mask=mask)


def dropout_mask(
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    num_tokens: int,
    num_heads: int,
    dropout_p: float,
    dropout_seed: torch.Tensor,
    dropout_offset: int,
) -> torch.Tensor:
    """The mask of one attention, int32 (num_heads, num_tokens, W), arguments as in its forward."""
    quads = triton.cdiv(max_seqlen, 128)
    shape = (num_heads, num_tokens, 4 * quads)
    mask = torch.empty(shape, dtype=torch.int32, device=cu_seqlens.device)
    block_m, num_warps = _attention_config.dropout_mask()
    place = _attention.tiling(cu_seqlens, num_tokens, max_seqlen, num_heads, block_m)
    seed, threshold, offset, _ = _philox.dropout_args(dropout_p, dropout_seed, dropout_offset)
    with torch.cuda.device_of(cu_seqlens):
        _attention_dropout_mask_kernel[place.grid](
            mask,
            cu_seqlens,
            seed,
            threshold,
            offset,
            num_tokens,
            quads,
            place.tiles_per_sequence,
            BLOCK_M=block_m,
            num_warps=num_warps,
        )
    return mask


def chosen_mask(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    p: float, seed: torch.Tensor | None, offset: int,
) -> torch.Tensor | None:  # fmt: skip
    """The mask where ``_attention_config.dropout`` takes it, None for no dropout or for Philox."""
    if seed is None or p == 0.0 or not len(qkv) or _attention_config.dropout() == "philox":
        return None
    if qkv.element_size() != 2:  # in fp32 two of the kernels that read the mask spill
        return None
    num_tokens, _, num_heads, _ = qkv.shape
    return dropout_mask(cu_seqlens, max_seqlen, num_tokens, num_heads, p, seed, offset)
