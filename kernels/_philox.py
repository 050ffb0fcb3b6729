"""Dropout as a pure function of (seed, offset, position): Philox4x32-10 inside a kernel.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The key is the
64-bit seed, the counter is (col // 4, row, offset, plane), and element (row, col) takes word
col % 4. It is kept iff its word is at least floor(p * 2**32). Every backend draws these same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """The four dropout arguments of a kernel.

    seed: int64 tensor of one element on the device, or None for no dropout.
    threshold: smallest uint32 word that keeps an element.
    offset: uint32, the dropout site.
    keep_scale: 1 / (1 - p); the kernels receive it rounded to fp32.
    """

    seed: torch.Tensor | None
    threshold: int
    offset: int
    keep_scale: float


def dropout_args(p: float, seed: torch.Tensor | None, offset: int) -> Dropout:
    """Kernel arguments for dropout with probability ``p``; without a seed when it is 0."""
    if p == 0.0:
        return Dropout(None, 0, 0, 1.0)
    return Dropout(seed, int(p * 2.0**32), offset, 1.0 / (1.0 - p))


@triton.jit
def keep_mask(seed_ptr, threshold, offset, plane, rows, first_col, BLOCK_COLS: tl.constexpr):
    """Which elements of a tile survive dropout: int1 (R, BLOCK_COLS).

    seed_ptr: int64 seed.  threshold, offset: as in ``Dropout``.  plane: counter word 3.
    rows: (R,) int32 row of each tile row.  first_col: column of the tile's left edge, a multiple
    of 4.  BLOCK_COLS: power of two from 4.
    """
    # One Philox call serves four neighbouring columns: compute a quarter as many counters, then
    # interleave the four words' comparisons (bits move between threads more cheaply than words).
    groups = first_col // 4 + tl.arange(0, BLOCK_COLS // 4)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        groups[None, :].to(tl.uint32),
        rows[:, None].to(tl.uint32),
        offset.to(tl.uint32),
        tl.cast(plane, tl.uint32),
    )
    limit = threshold.to(tl.uint32)
    even = tl.join(word0 >= limit, word2 >= limit)
    odd = tl.join(word1 >= limit, word3 >= limit)
    return tl.join(even, odd).reshape(rows.shape[0], BLOCK_COLS)


@triton.jit
def keep_words(seed_ptr, threshold, offset, plane, rows, first_word, WORDS: tl.constexpr):
    """The same bits packed: int32 (R, WORDS), bit b of word w for column 32 (first_word + w) + b.

    rows: (R,) int32.  All else as in ``keep_mask``.
    """
    groups = 8 * (first_word + tl.arange(0, WORDS))
    limit = threshold.to(tl.uint32)
    seed = tl.load(seed_ptr)
    bits = tl.zeros([rows.shape[0], WORDS], tl.uint32)
    # The eight calls of a word are one thread's: no bit moves between threads.
    for group in range(8):
        word0, word1, word2, word3 = tl.philox(
            seed,
            (groups + group)[None, :].to(tl.uint32),
            rows[:, None].to(tl.uint32),
            offset.to(tl.uint32),
            tl.cast(plane, tl.uint32),
        )
        four = (word0 >= limit).to(tl.uint32) | (word1 >= limit).to(tl.uint32) << 1
        four |= (word2 >= limit).to(tl.uint32) << 2 | (word3 >= limit).to(tl.uint32) << 3
        bits |= four << 4 * group
    return bits.to(tl.int32, bitcast=True)
