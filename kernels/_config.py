"""Launch choices: pure functions of shape, dtype and compute capability, never of a measurement.

So the same call always runs the same code and gives the same bits, and every choice is compiled and
checked (registers, shared memory, spills) on machines without a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from fastbert import device

# Streaming multiprocessors: A100 108, H100 and H200 132, B200 148; the rest are close enough to 84
# (A10, RTX 3090, …). Only the number of row groups follows from it.
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}


class RowBlock(NamedTuple):
    """block_m: rows at once.  block_h: the whole row, padded to a power of two."""

    block_m: int
    block_h: int
    num_warps: int


class Tile(NamedTuple):
    """block_m, block_n: rows and columns of a two-dimensional tile."""

    block_m: int
    block_n: int
    num_warps: int


class MatmulTile(NamedTuple):
    """block_m, block_n: rows and columns of y.  block_k: of the sum, a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability to choose a launch on ``x`` for; CPU tensors (interpreter): sm_80's."""
    return _cuda_capability(x.device.index) if x.is_cuda else (8, 0)


_cuda_capability = functools.cache(device.cuda_capability)


def row_groups(num_blocks: int, column_blocks: int, arch: tuple[int, int]) -> int:
    """Programs that share ``num_blocks`` row blocks of each column block.

    Three of them fit the registers of a multiprocessor and keep its memory pipeline busy; more
    would only make more partial sums for the second pass to read.
    """
    wanted = triton.cdiv(3 * _MULTIPROCESSORS.get(arch, 84), column_blocks)
    return min(num_blocks, wanted)


def _row_block(width: int, elements: int, elements_per_thread: int) -> RowBlock:
    """Blocks of whole rows with about ``elements`` padded elements, at least one row."""
    block_h = max(16, triton.next_power_of_2(width))
    block_m = max(1, min(16, elements // block_h))
    num_warps = block_m * block_h // (32 * elements_per_thread)
    return RowBlock(block_m, block_h, min(32, max(1, num_warps)))


def layer_norm_fwd(width: int) -> RowBlock:
    """32 elements a thread: four 16-byte loads of 16-bit elements in flight for each operand."""
    return _row_block(width, 4096, 32)


def layer_norm_bwd(width: int, itemsize: int) -> RowBlock:
    """8 elements a thread: three fp32 sums of the block's size stay in registers.

    On sm_100 a second row a block spills in 16 bits, and its absence does in fp32.
    """
    return _row_block(width, 2048 if itemsize == 4 else 1024, 8)


def tile(width: int, itemsize: int) -> Tile:
    """Tiles for elementwise work and row moves: 64 bytes a thread and operand."""
    block_n = min(512, max(16, triton.next_power_of_2(width)))
    block_m = max(1, 64 * 128 // itemsize // block_n)
    return Tile(block_m, block_n, 4)


def bias_gelu_bwd(width: int) -> Tile:
    """16 elements a thread with their fp32 sums; 32 spill on sm_100 in the tanh form."""
    block_n = min(256, max(16, triton.next_power_of_2(width)))
    return Tile(2048 // block_n, block_n, 4)


def sum_partials() -> tuple[int, int, int]:
    """(groups at once, columns, warps) of the ordered second pass: narrow, hence many programs."""
    return 64, 32, 4


def cross_entropy_rows(num_classes: int) -> tuple[int, int]:
    """(classes a step, warps): 16 elements a thread, eight steps for BERT's vocabulary."""
    block_v = min(4096, max(128, triton.next_power_of_2(num_classes)))
    return block_v, block_v // 512 or 1


# Sorted tokens that one program sums: long enough that partial sums are few, short enough that a
# batch of 64k tokens makes thousands of programs.
RUN_CHUNK = 32


def sum_chunks(width: int) -> tuple[int, int]:
    """(columns, warps): one warp with 16-byte loads walks the chunk's rows."""
    return min(256, max(32, triton.next_power_of_2(width))), 1


def join_chunks() -> tuple[int, int, int]:
    """(chunks at once, columns, warps): narrow, so that a long run is read by many programs."""
    return 64, 32, 4


def matrix_unit(arch: tuple[int, int]) -> str:
    if arch < (8, 0):
        return "none"
    return {9: "wgmma", 10: "tcgen05"}.get(arch[0], "mma")


# Row tiles that share a column tile of a product while it is in L2: 8 x 128 rows of BERT-base's
# activations are 1.6 MB in bf16, the weights they meet 4.7 MB.
GROUP_M = 8


def linear_int8(num_rows: int, arch: tuple[int, int]) -> MatmulTile:
    """128 x 128 tiles where there are rows to fill them; a handful of rows only streams weights."""
    if num_rows <= 64:
        return MatmulTile(16 if num_rows <= 16 else 64, 64, 128, 4, 4)
    if arch[0] >= 9:
        return MatmulTile(128, 128, 128, 8, 3)
    return MatmulTile(128, 128, 64, 8, 3)


def linear_fp8(num_rows: int) -> MatmulTile:
    """As for int8; 128 of the sum a step is also what goes to fp32 sums at a time."""
    if num_rows <= 64:
        return MatmulTile(16 if num_rows <= 16 else 64, 64, 128, 4, 4)
    return MatmulTile(128, 128, 128, 8, 3)


class FeedForwardTile(NamedTuple):
    """block_m, block_n: rows and columns of the output.  block_k: of the sum, a step.

    parts: the epilogue takes a tile's columns in so many parts, one after the other: what it holds
        in registers and in shared memory is one part wide.
    descriptors: tiles move through tensor descriptors, by the copy engine, and the programs are
        persistent: what a tile writes leaves while the next one's operands come.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int
    descriptors: bool


# 128 x 256 where the accumulators fit (two warpgroups' registers, or tensor memory): a 128 x 128
# tile asks L2 for 64 bytes a cycle and multiprocessor at full rate, a 128 x 256 tile for 48. Stages
# fill what the epilogue leaves of shared memory. Before sm_90 a descriptor is taken apart into
# masked 4-byte accesses; so plain pointers, and a program a tile, since two fit a multiprocessor.
_FEED_FORWARD_TILES = {
    ("fwd", "mma"): (128, 128, 32, 8, 4, 2, False),
    ("fwd", "wgmma"): (128, 256, 64, 8, 4, 2, True),
    ("fwd", "tcgen05"): (128, 256, 64, 8, 4, 4, True),
    ("bwd", "mma"): (128, 128, 32, 8, 4, 4, False),
    ("bwd", "wgmma"): (128, 256, 64, 8, 4, 8, True),
    ("bwd", "tcgen05"): (128, 256, 64, 8, 4, 4, True),
}


def feed_forward(half: str, arch: tuple[int, int]) -> FeedForwardTile:
    """Tiles of the feed-forward's products with GELU in the epilogue; half: "fwd" or "bwd"."""
    return FeedForwardTile(*_FEED_FORWARD_TILES[half, matrix_unit(arch)])


def persistent_programs(tiles: int, arch: tuple[int, int]) -> int:
    """Programs that share ``tiles`` tiles, one a multiprocessor."""
    return min(tiles, _MULTIPROCESSORS.get(arch, 84))
