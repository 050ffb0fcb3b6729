"""The tiles of packed sequences, longest sequence first: a list that the device makes for itself.

int32 (P, 3): the sequence's first token, where it ends, and the tile in it. Sequences of equal
length keep their order. P is what the host knows to suffice without reading a length, so places may
be left over at the end: theirs is an empty sequence, and a program that finds one returns. What a
program computes does not depend on its place, so neither does any bit of the whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention_config

# A tile that holds any sequence.
WHOLE_SEQUENCE = 1 << 30


@triton.jit(do_not_specialize=["num_sequences", "num_places"])
def _attention_tile_list_kernel(
    cu_seqlens_ptr,
    tile_list_ptr,
    num_sequences,
    num_places,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The places of BLOCK sequences, and this program's share of those left over.

    A sequence's first place is the sum of the tiles of those that precede it: longer ones, and
    equal ones of lower index.  cu_seqlens_ptr: int32 (num_sequences + 1,).  tile_list_ptr: int32
    (num_places, 3).  TILE: tokens of a tile.  BLOCK: also sequences compared with in a step.
    """
    sequences = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequences < num_sequences
    first = tl.load(cu_seqlens_ptr + sequences, mask=exists, other=0)
    length = tl.load(cu_seqlens_ptr + sequences + 1, mask=exists, other=0) - first
    place = tl.zeros([BLOCK], tl.int32)
    listed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_sequences, BLOCK):
        others = start + tl.arange(0, BLOCK)
        # Past the last sequence a length of 0: no tiles.
        other = tl.load(cu_seqlens_ptr + others + 1, mask=others < num_sequences, other=0)
        other -= tl.load(cu_seqlens_ptr + others, mask=others < num_sequences, other=0)
        tiles = (other + TILE - 1) // TILE
        tie = (other[None, :] == length[:, None]) & (others[None, :] < sequences[:, None])
        precedes = (other[None, :] > length[:, None]) | tie
        place += tl.sum(tl.where(precedes, tiles[None, :], 0), 1)
        listed += tiles
    tiles = (length + TILE - 1) // TILE
    for tile in range(0, tl.max(tiles, 0)):
        entry = tile_list_ptr + (place + tile) * 3
        tl.store(entry, first, mask=tile < tiles)
        tl.store(entry + 1, first + length, mask=tile < tiles)
        tl.store(entry + 2, tile, mask=tile < tiles)
    for start in range(tl.sum(listed, 0), num_places, tl.num_programs(0) * BLOCK):
        entry = tile_list_ptr + (start + sequences) * 3
        for part in tl.static_range(3):
            tl.store(entry + part, 0, mask=start + sequences < num_places)


def tile_list(cu_seqlens: torch.Tensor, num_tokens: int, block: int) -> torch.Tensor:
    """The list for tiles of ``block`` tokens of the sequences of int32 ``cu_seqlens`` (B + 1,).

    num_tokens: at least cu_seqlens[B].
    """
    num_sequences = cu_seqlens.shape[0] - 1
    num_places = num_tokens // block + num_sequences  # ceil(n / block) summed is no more
    places = torch.empty(num_places, 3, dtype=torch.int32, device=cu_seqlens.device)
    step = _attention_config.TILE_LIST_BLOCK
    with torch.cuda.device_of(cu_seqlens):
        _attention_tile_list_kernel[(triton.cdiv(num_sequences, step),)](
            cu_seqlens, places, num_sequences, num_places, TILE=block, BLOCK=step, num_warps=4
        )
    return places
