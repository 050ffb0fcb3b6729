"""Dense gradients of embedding tables, without atomics.

The tokens' gradient rows are visited in the order of a stable sort of their ids, so each table row
is the sum of one contiguous *run*. Fixed-size chunks of the sorted order are summed in parallel,
whatever the lengths of the runs; runs that cross a chunk's edge leave partial sums, which a second
kernel adds in order. The same ids give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config


@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def _sum_chunks_kernel(
    de_ptr,
    sorted_ids_ptr,
    order_ptr,
    table_grad_ptr,
    partial_ptr,
    num_tokens,
    num_entries,
    width,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum one chunk of the sorted tokens, run by run; program (chunk, column block).

    de_ptr: (num_tokens, width).  sorted_ids_ptr: (num_tokens,) integers, ascending.  order_ptr:
    int64 (num_tokens,), the token at each sorted place.  table_grad_ptr: (num_entries, width),
    takes runs that lie inside the chunk.  partial_ptr: fp32 (number of chunks, 2, width), takes the
    others: slot 0 the part of a run that began in an earlier chunk, slot 1 the start of one that
    goes on.
    CHUNK: tokens a chunk.  BLOCK_N: columns.
    """
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, num_tokens)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = cols < width
    partial_row = partial_ptr + chunk.to(tl.int64) * 2 * width + cols
    # One id past each end tells whether the outer runs go on there; -2 is no id (see sum_runs).
    entry_before = tl.load(sorted_ids_ptr + first - 1, mask=first > 0, other=-2).to(tl.int32)
    entry = tl.load(sorted_ids_ptr + first).to(tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for place in range(first, stop):
        token = tl.load(order_ptr + place)
        total += tl.load(de_ptr + token * width + cols, mask=in_width, other=0.0).to(tl.float32)
        following = tl.load(sorted_ids_ptr + place + 1, mask=place + 1 < num_tokens, other=-2).to(
            tl.int32
        )
        if (following != entry) | (place + 1 == stop):
            began_before = entry == entry_before
            inside = (following != entry) & (entry != entry_before)
            crosses = (following == entry) | began_before
            valid = (entry >= 0) & (entry < num_entries)
            table_row = table_grad_ptr + entry.to(tl.int64) * width + cols
            tl.store(table_row, total, mask=in_width & inside & valid)
            slot = tl.where(began_before, 0, width)
            tl.store(partial_row + slot, total, mask=in_width & crosses)
            total = tl.zeros([BLOCK_N], tl.float32)
        entry = following


@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def _join_chunks_kernel(
    sorted_ids_ptr,
    table_grad_ptr,
    partial_ptr,
    num_tokens,
    num_entries,
    width,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Finish the run, if any, that begins in this program's chunk and ends in a later one.

    Arguments as in ``_sum_chunks_kernel``.  BLOCK_C: chunks added at once.
    """
    chunk = tl.program_id(0)
    last = chunk * CHUNK + CHUNK - 1
    if last + 1 >= num_tokens:
        return
    entry = tl.load(sorted_ids_ptr + last).to(tl.int32)
    before = tl.load(sorted_ids_ptr + last - CHUNK, mask=chunk > 0, other=-2).to(tl.int32)
    if (tl.load(sorted_ids_ptr + last + 1).to(tl.int32) != entry) | (before == entry):
        return
    if (entry < 0) | (entry >= num_entries):
        return
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = cols < width
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    next_chunk = chunk + 1
    while next_chunk > 0:
        chunks = next_chunk + tl.arange(0, BLOCK_C)
        # Ids ascend: a chunk continues the run exactly if its first token has the same id.
        first_entry = tl.load(
            sorted_ids_ptr + chunks * CHUNK, mask=chunks * CHUNK < num_tokens, other=-2
        ).to(tl.int32)
        continues = first_entry == entry
        heads = partial_ptr + chunks.to(tl.int64)[:, None] * 2 * width + cols[None, :]
        total += tl.load(heads, mask=continues[:, None] & in_width[None, :], other=0.0)
        goes_on = tl.sum(continues.to(tl.int32), 0) == BLOCK_C
        next_chunk = tl.where(goes_on, next_chunk + BLOCK_C, 0)
    tail = tl.load(partial_ptr + (chunk.to(tl.int64) * 2 + 1) * width + cols, mask=in_width)
    table_row = table_grad_ptr + entry.to(tl.int64) * width + cols
    tl.store(table_row, tail + tl.sum(total, 0), mask=in_width)


def sum_runs(de: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Gradient of ``table``: row i is the sum of the rows of ``de`` whose id is i.

    de: (T, H).  ids: (T,) int64; -1 or lower and table rows or higher add nothing.
    """
    num_tokens, width = de.shape
    num_entries = table.shape[0]
    grad = torch.zeros_like(table)
    # A radix sort takes a pass a byte: sort the narrowest integers that hold -1 .. num_entries.
    fits = (d for d in (torch.int8, torch.int16, torch.int32) if num_entries <= torch.iinfo(d).max)
    sorted_ids, order = ids.clamp(-1, num_entries).to(next(fits)).sort(stable=True)
    chunk = _config.RUN_CHUNK
    num_chunks = triton.cdiv(num_tokens, chunk)
    partial = torch.empty(num_chunks, 2, width, dtype=torch.float32, device=de.device)
    block_n, num_warps = _config.sum_chunks(width)
    _sum_chunks_kernel[(num_chunks, triton.cdiv(width, block_n))](
        de,
        sorted_ids,
        order,
        grad,
        partial,
        num_tokens,
        num_entries,
        width,
        CHUNK=chunk,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    block_c, block_n, num_warps = _config.join_chunks()
    _join_chunks_kernel[(num_chunks, triton.cdiv(width, block_n))](
        sorted_ids,
        grad,
        partial,
        num_tokens,
        num_entries,
        width,
        CHUNK=chunk,
        BLOCK_C=block_c,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return grad
