"""The second half of every parameter gradient: add up the row groups' partial sums, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config


@triton.jit(do_not_specialize=["num_groups"])
def _sum_partials_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    num_groups,
    width,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out_k[w] = sum over g of partial[k, g, w]; one program per (column block, k).

    partial_ptr: fp32 (K, num_groups, width).  first_ptr, second_ptr, third_ptr: (width,) outputs
    for k = 0, 1, 2; second and third None where K is smaller.  num_groups, width: sizes.
    BLOCK_G: groups read at once.  BLOCK_W: columns a program.
    """
    slot = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = cols < width
    base = partial_ptr + slot.to(tl.int64) * num_groups * width
    total = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    for start in range(0, num_groups, BLOCK_G):
        groups = start + tl.arange(0, BLOCK_G)
        mask = (groups < num_groups)[:, None] & in_width[None, :]
        total += tl.load(base + groups[:, None] * width + cols[None, :], mask=mask, other=0.0)
    column_sum = tl.sum(total, 0)
    if slot == 0:
        tl.store(first_ptr + cols, column_sum, mask=in_width)
    if second_ptr is not None and slot == 1:
        tl.store(second_ptr + cols, column_sum, mask=in_width)
    if third_ptr is not None and slot == 2:
        tl.store(third_ptr + cols, column_sum, mask=in_width)


def sum_partials(partial: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Sums over dim 1 of ``partial`` (K, G, W) fp32, K from 1 to 3: K vectors (W,) of ``dtype``."""
    num_sums, num_groups, width = partial.shape
    sums = [torch.empty(width, dtype=dtype, device=partial.device) for _ in range(num_sums)]
    block_g, block_w, num_warps = _config.sum_partials()
    grid = (triton.cdiv(width, block_w), num_sums)
    _sum_partials_kernel[grid](
        partial,
        *sums,
        *[None] * (3 - num_sums),
        num_groups,
        width,
        BLOCK_G=block_g,
        BLOCK_W=block_w,
        num_warps=num_warps,
    )
    return sums
