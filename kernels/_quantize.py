"""Rows to int8, inside a kernel that holds them whole."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_int8(x):
    """x rounded half to even, clamped to -127 .. 127."""
    # Adding and taking away 1.5 2^23 leaves the nearest integer, halves going to the even one.
    rounded = (x + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def quantize_block(x, in_width):
    """q, scale and offset of each row of a block: offset is the middle of the row's range, scale
    its 254th part, q = (x - offset) / scale rounded half to even.

    x: fp32 (BLOCK_M, BLOCK_H).  in_width: (BLOCK_H,) which columns exist.
    """
    high = 0.5 * tl.max(tl.where(in_width[None, :], x, float("-inf")), 1)
    low = 0.5 * tl.min(tl.where(in_width[None, :], x, float("inf")), 1)
    half, offset = high - low, high + low
    limit = 127.0 + 0.0 * half  # as a block, which div_rn wants
    inverse = tl.where(half > 0.0, tl.div_rn(limit, half), 0.0)
    q = round_to_int8((x - offset[:, None]) * inverse[:, None])
    return q, tl.div_rn(half, limit), offset
