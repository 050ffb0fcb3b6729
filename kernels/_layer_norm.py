"""Layer normalisation of a block of rows held in registers, shared by the kernels that end in one.

Ba, Kiros, Hinton: "Layer Normalization" (arXiv 1607.06450). Blocks are (BLOCK_M, BLOCK_H) in fp32,
BLOCK_H the row width padded to a power of two, and hold 0 past ``width``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_statistics(z, in_width, width, eps):
    """Mean and 1/sqrt(variance + eps) of each row, two passes over registers.

    z: the block.  in_width: (BLOCK_H,) which columns exist.  width: how many.  eps: scalar.
    """
    mean = tl.sum(z, 1) / width
    centred = tl.where(in_width[None, :], z - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)


@triton.jit
def normalize(z, mean, rstd, in_width):
    """(z - mean) rstd, 0 past the row's width."""
    return tl.where(in_width[None, :], (z - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def input_gradient(dy, normalized, weight, rstd, width):
    """dz = rstd (g - mean(g) - n mean(g n)) with g = dy weight and n the normalized rows."""
    g = dy * weight[None, :]
    mean_g = tl.sum(g, 1) / width
    mean_gn = tl.sum(g * normalized, 1) / width
    return rstd[:, None] * (g - mean_g[:, None] - normalized * mean_gn[:, None])
