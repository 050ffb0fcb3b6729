"""The order in which programs take the tiles of a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(index, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row tile and column tile of output tile ``index``: groups of GROUP_M row tiles share the
    column tiles while they are in L2."""
    group = index // (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * column_tiles)
    return group * GROUP_M + within % group_rows, within // group_rows
