"""Launch choices of attention: tiles of each kernel, which backward, where dropout comes from.

As in ``_config``: pure functions of shape, dtype and compute capability, each choice compiled and
held to fit by the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from fastbert.kernels._config import matrix_unit


class Tile(NamedTuple):
    """block_m: queries a tile.  block_n: keys a tile.  num_stages: tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """One tile for each of the three attention kernels."""

    fwd: Tile
    bwd_dq: Tile
    bwd_dkdv: Tile


# Attention tiles (fwd, bwd_dq, bwd_dkdv), each (queries, keys, warps, stages), by the matrix unit,
# the head dimension padded to a power of two, and dropout, whose counters need registers of their
# own. Each compiles without spills (bench/triton_resources.py holds them to it). On the mma.sync
# generations (sm_8x, sm_12x) they also fit the 99 KB of shared memory of the smaller chips.
_TILES = {
    "mma": {
        (32, False): ((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        (32, True): ((64, 64, 4, 3), (64, 32, 4, 2), (32, 64, 4, 2)),
        (64, False): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
        (64, True): ((128, 64, 8, 3), (64, 32, 4, 2), (32, 128, 8, 2)),
        (128, False): ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        (128, True): ((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        (256, False): ((64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 8, 1)),
        (256, True): ((64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 8, 1)),
    },
    "wgmma": {
        (32, False): ((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        (32, True): ((64, 64, 4, 3), (64, 32, 4, 2), (32, 64, 4, 2)),
        (64, False): ((128, 128, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
        (64, True): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
        (128, False): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        (128, True): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        (256, False): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
        (256, True): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    },
    "tcgen05": {
        (32, False): ((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        (32, True): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        (64, False): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        (64, True): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        (128, False): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        (128, True): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        (256, False): ((64, 64, 8, 2), (64, 16, 8, 2), (32, 32, 8, 1)),
        (256, True): ((64, 64, 8, 2), (64, 16, 8, 2), (32, 32, 8, 1)),
    },
}
# fp32 products in full precision run on the ordinary FMA units, the same on every generation. Tiles
# stay under 64 rows: from 64 on, Triton 3.7 gives some of these products to sm_100's tcgen05, in
# tf32, in spite of input_precision="ieee" (the compile test looks for that).
_TILES_FP32 = {
    32: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    64: ((32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 8, 1)),
    128: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1)),
    256: ((16, 16, 4, 1), (16, 16, 4, 2), (16, 16, 8, 1)),
}


# Triton leaves the matrix units of sm_75 alone: there the ordinary ones multiply in every dtype, in
# 64 KB of shared memory. Head dimensions above 128 do not fit. By element size.
_TILES_SM75 = {
    2: {
        32: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        64: ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    4: {
        32: ((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        64: ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    },
}


# The same with a bias, whose tiles take registers and shared memory, on every unit, with dropout or
# without; by element size.
_BIAS_TILES = {
    2: {
        32: ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
        64: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 1)),
        128: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 1)),
        256: ((64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 8, 1)),
    },
    4: _TILES_FP32 | {32: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1))},
}


# Kernels that spill where words of the mask are among what is in flight.
_ONE_STAGE_WITH_MASK = {("mma", 128): "bwd_dq", ("tcgen05", 32): "bwd_dkdv"}


def tiles(
    head_dim: int,
    itemsize: int,
    dropout: bool,
    arch: tuple[int, int],
    bias: bool = False,
    mask: bool = False,
) -> Tiles:
    """Tiles of forward and of both backward kernels for a head dimension up to 256 (sm_75: 128).

    mask: dropout comes from the packed mask. Its tiles have as many keys and queries, so that the
    sums have the same bits.
    """
    padded = max(32, triton.next_power_of_2(head_dim))
    if matrix_unit(arch) == "none":
        tiles = _TILES_SM75[itemsize][padded]
    elif bias:
        tiles = _BIAS_TILES[itemsize][padded]
    elif itemsize == 4:
        tiles = _TILES_FP32[padded]
    else:
        tiles = _TILES[matrix_unit(arch)][padded, dropout]
    found = Tiles(*(Tile(*tile) for tile in tiles))
    half = _ONE_STAGE_WITH_MASK.get((matrix_unit(arch), padded))
    if mask and itemsize == 2 and half is not None:
        return found._replace(**{half: getattr(found, half)._replace(num_stages=1)})
    return found


# Backward of sequences up to block_m in one kernel (_attention_bwd_short), keyed as above.
_BWD_SHORT_TILES = {
    "mma": {
        (32, False): (128, 64, 8, 2),
        (32, True): (128, 64, 8, 2),
        (64, False): (128, 32, 8, 2),
        (64, True): (128, 32, 8, 1),
        (128, False): (64, 64, 8, 2),
        (128, True): (64, 64, 8, 2),
    },
    "wgmma": {
        (32, False): (128, 64, 8, 2),
        (32, True): (128, 64, 8, 2),
        (64, False): (128, 64, 8, 2),
        (64, True): (128, 64, 8, 2),
        (128, False): (128, 64, 8, 1),
        (128, True): (64, 64, 8, 2),
    },
    "tcgen05": {
        (32, False): (128, 64, 8, 2),
        (32, True): (128, 64, 8, 2),
        (64, False): (128, 64, 8, 2),
        (64, True): (128, 64, 8, 2),
        (128, False): (128, 64, 8, 1),
        (128, True): (128, 64, 8, 1),
    },
}
# Backward in one kernel over several key tiles (_attention_bwd_one_pass) for D = 64, keyed by
# dropout. No tile fits the registers elsewhere: mma.sync keeps K and V there as operands.
_BWD_ONE_PASS_TILES = {
    "wgmma": {False: (64, 128, 8, 2), True: (32, 128, 8, 2)},
    "tcgen05": {False: (64, 128, 8, 1), True: (64, 128, 8, 1)},
}


# With a bias. 128 keys and dropout spill 2 instructions on sm_90.
_BWD_ONE_PASS_BIAS_TILES = {
    "wgmma": {False: (32, 128, 8, 1), True: (32, 64, 8, 2)},
    "tcgen05": {False: (64, 128, 8, 1), True: (64, 128, 8, 1)},
}


def bwd_short(
    head_dim: int,
    itemsize: int,
    dropout: bool,
    arch: tuple[int, int],
    bias: bool = False,
    mask: bool = False,
) -> Tile | None:
    """Tile of the backward that serves lengths up to its block_m; None where there is none."""
    padded, unit = max(32, triton.next_power_of_2(head_dim)), matrix_unit(arch)
    tile = _BWD_SHORT_TILES.get(unit, {}).get((padded, dropout))
    if tile is None or itemsize != 2:
        return None
    if bias and (padded > 64 or (unit == "mma" and dropout)):  # these spill
        return None
    if mask and (unit, padded) == ("mma", 128):
        # 15 instructions spill with 64 keys a step; mma.sync adds 16 by 16 in the same order.
        return Tile(64, 32, 8, 2)
    return Tile(*tile)


def bwd_one_pass(
    head_dim: int,
    itemsize: int,
    dropout: bool,
    arch: tuple[int, int],
    bias: bool = False,
    mask: bool = False,
) -> Tile | None:
    """Tile of the one-pass backward, with a mask the same; None where there is none."""
    unit = matrix_unit(arch)
    if unit not in _BWD_ONE_PASS_TILES or (head_dim, itemsize) != (64, 2):
        return None
    tiles = _BWD_ONE_PASS_BIAS_TILES if bias else _BWD_ONE_PASS_TILES
    return Tile(*tiles[unit][dropout])


def bwd(
    max_seqlen: int,
    head_dim: int,
    itemsize: int,
    dropout: bool,
    arch: tuple[int, int],
    bias: bool = False,
    mask: bool = False,
) -> str:
    """Which backward runs: "short" where it can, else "two_kernels"; "one_pass" is for the bench.

    Counted on sm_90 for D = 64 and 8192 scores (a 128 x 64 tile), without and with dropout:

                   products  MMA cycles  exps  instructions a warp  bytes at S = 128, 512
        two kernels       7        1792  2 x 8192     690 / 2083           24, 24
        short             5        1280  1 x 8192     507 / 1297           16, -
        one pass          5        1280  1 x 8192     801 / 1768            -, 20

    MMA cycles: at 2048 multiply-adds a cycle (1536 for short, by its reads of shared memory).
    Instructions: of the inner loops in SASS, for each of 8 warps; two of them share an issue slot.
    Bytes: of DRAM, a token, head and channel. L2 moves 32 kB a tile for two kernels and 48 kB for
    one pass, two thirds of it the sums of dQ.

    So short, at the same number of programs, needs 2/3 of the bytes, which bound S = 128, 5/7 of
    the products and 5/8 to 3/4 of the instructions: it wins on every count. One pass saves products
    always, instructions under dropout alone, and pays in L2 traffic and in programs as long as a
    sequence: only a measurement can tell.

    dQ on the chip ends at S = 128 here. Short with 256 queries a tile has, on sm_90, 9 instructions
    that spill with 64 keys a step (144 with dropout from a mask), for dQ, p and dp take 192 of 255
    registers. With 32 keys it just fits without dropout and with a mask (475 and 686 instructions),
    and spills with Philox (33); but 32 rows of dK and dV are too few for wgmma, and mma.sync at
    half its rate makes up for the two products saved: 1792 cycles, as in two kernels, with no room
    for a tile in flight, and 256 queries computed for a sequence of 129. At 512 dQ alone takes half
    of the 128 registers that 16 warps have, p and dp of 64 keys the other half twice. Shared
    memory, where its sums would fit (128 KB), cannot hold an accumulator in Triton: that is for
    CUDA C++.
    """
    tile = bwd_short(head_dim, itemsize, dropout, arch, bias, mask)
    return "two_kernels" if tile is None or max_seqlen > tile.block_m else "short"


def dropout() -> str:
    """Where attention's dropout comes from: "philox", drawn in the kernels, or "mask", packed bits
    that are drawn once and read (``_attention_dropout``).

    Counted on sm_90 for D = 64, instructions a warp as in ``bwd``, of forward, of
    backward in two kernels or in short, and of making the mask; the sums at S = 512 and 128; and
    what these take on an H200 in nanoseconds, for a token of BERT-base's 12 heads, at the full rate
    of 132 x 4 instructions a cycle of 1.7 GHz, beside the bytes' time at 4.3 TB/s, the mask's bits
    among them:

                forward  two  short  making   S = 512:  ns  bytes'   S = 128:  ns  bytes'
        philox     1032  2083  1297       0       3115  20.8   5.7       2329  3.9   4.3
        mask        537  1093   717     490       2120  14.2   6.4       1744  2.9   4.4

    The mask is S / 8 bytes a token and head, written once and read by each kernel. So it should
    take a third off attention with dropout at S = 512, where instructions bound it, and nothing at
    128, where bytes do. Each half makes the mask anew unless it is brought one, which leaves 17.4
    and 3.7 ns: who chooses it should have the op save it. Philox until a GPU has measured that.
    """
    return "philox"


def dropout_mask() -> tuple[int, int]:
    """(queries a tile, warps) of the packed mask: a thread draws four words, 16 bytes, of a row."""
    return 64, 2


def longest_first(num_tokens: int, num_sequences: int, max_seqlen: int, itemsize: int) -> bool:
    """Whether attention takes its tiles from a list, longest sequence first, or as they come.

    What it saves of the time as they come, in a simulated queue before 132 multiprocessors: two
    programs of forward or one of backward each, 2 us and 2 more (backward: 4) for 128 keys, and .2
    us for a program without work; 12 heads, and the bench's lengths of at most 512:

                      forward, ragged  wikipedia    backward, ragged  wikipedia
        16 sequences     4.2 us  21%    2.2  11%        7.8   13%      6.0  10%
        64               4.5      7%    3.3   5%       10.0    5%      8.3   4%
        256              6.6      3%    5.4   2%       13.4    2%     14.5   2%

    Making the list is one small kernel, 2 to 3 us, for each half of each layer. So: where lengths
    differ by more than a tile, and there are tokens enough to be worth it. In fp32, whose programs
    are many and short for their tiles of 16 or 32 queries, a kernel spills with a list, too. Not
    yet measured.
    """
    differ = 8 * num_tokens <= 7 * num_sequences * max_seqlen
    return differ and max_seqlen > 128 and num_tokens >= 4096 and itemsize == 2


# Sequences that a program of the tile list ranks: of a few thousand each has its own programs.
TILE_LIST_BLOCK = 64
