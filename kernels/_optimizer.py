"""What the optimisers' kernels share: the table of addresses, Adam's moments and direction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Elements a program: BERT-base's 110 M make some 6,700 programs, fifty a multiprocessor.
CHUNK = 16384
# Elements at once: 4 a thread of 4 warps, 16 bytes of each fp32 operand. With more, 16-bit
# gradients would take a layout of their own, and the way between the two is shared memory.
BLOCK = 512
NUM_WARPS = 4

# Columns of Table.rows.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
COPY = tl.constexpr(4)
STEP = tl.constexpr(5)
LR = tl.constexpr(6)
NUMEL = tl.constexpr(7)
FIRST_CHUNK = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


class Table(NamedTuple):
    """Tensors with gradients of one dtype and copies of one dtype, as the kernels read them.

    rows: int64 (n, 9), one tensor a row: addresses, then its size and the number of its first
        chunk (see the columns above).
    decays: fp32 (n,), weight decays.
    chunks: int32 (C,), the row that each program works on, ascending.
    grad, copy: the dtypes; copy None where there are no copies.
    aligned: whether every address of an array is a multiple of 16 bytes.
    """

    rows: torch.Tensor
    decays: torch.Tensor
    chunks: torch.Tensor
    grad: torch.dtype
    copy: torch.dtype | None
    aligned: bool


def tabulate(slots: Sequence[Any]) -> list[Table]:
    """One table for each (dtype of gradient, dtype of copy) among ``slots``.

    slots: (param, grad, exp_avg, exp_avg_sq, copy or None, step, lr, weight_decay) of each tensor:
        arrays contiguous and of one size, param and the moments fp32; step, lr fp32 of one element
        on the same device. A tensor may be empty: a rank may hold no shard of it.
    The addresses are read here and now: whoever launches on the tables keeps the tensors alive.
    """
    kinds: dict[tuple[Any, Any], list[Any]] = {}
    for slot in slots:
        _, grad, _, _, copy, *_ = slot
        kinds.setdefault((grad.dtype, None if copy is None else copy.dtype), []).append(slot)
    return [_table(*kind, group) for kind, group in kinds.items()]


def _table(grad: torch.dtype, copy: torch.dtype | None, slots: list[Any]) -> Table:
    counts = [triton.cdiv(slot[0].numel(), CHUNK) for slot in slots]
    rows, aligned = [], True
    for slot, first in zip(slots, accumulate(counts, initial=0), strict=False):
        arrays = [0 if x is None else x.data_ptr() for x in slot[:5]]
        aligned &= all(address % 16 == 0 for address in arrays)
        step, lr = slot[5:7]
        rows.append([*arrays, step.data_ptr(), lr.data_ptr(), slot[0].numel(), first])
    device = slots[0][0].device
    chunks = torch.repeat_interleave(
        torch.arange(len(slots), dtype=torch.int32), torch.tensor(counts)
    )
    decays = torch.tensor([slot[7] for slot in slots], dtype=torch.float32)
    return Table(
        _to(device, torch.tensor(rows)), _to(device, decays), _to(device, chunks),
        grad, copy, aligned,
    )  # fmt: skip


def _to(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """On ``device``, without waiting for what runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@triton.jit
def locate(rows_ptr, chunks_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tensor, its row, and the elements that it has to update: from start to whole
    in blocks, then the less than a block from whole to end."""
    tensor = tl.load(chunks_ptr + tl.program_id(0)).to(tl.int64)
    row = rows_ptr + tensor * COLUMNS
    start = (tl.program_id(0) - tl.load(row + FIRST_CHUNK)) * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(row + NUMEL))
    whole = start + (end - start) // BLOCK * BLOCK
    return tensor, row, start, whole, end


@triton.jit
def address(row, column, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to elements of TYPE in ``column`` of a row."""
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def scalar(row, column):
    """The fp32 number behind the pointer in ``column`` of a row."""
    return tl.load(tl.load(row + column).to(tl.pointer_type(tl.float32)))


@triton.jit
def load(pointer, mask):
    """A block in fp32, 0 where it is masked; without a mask where ``mask`` is None."""
    if mask is None:  # noqa: SIM108 - Triton compiles both arms of a conditional expression
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _one_minus_exp(y):
    """1 - exp(y) for y <= 0, with full relative precision near 0, where beta^step is nearly 1."""
    series = 1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0)))
    return tl.where(y > -0.25, -y * (1.0 + y / 2.0 * series), 1.0 - tl.exp(y))


@triton.jit
def corrections(row, log_beta1, log_beta2, BIAS_CORRECTION: tl.constexpr):
    """1 - beta1^step and sqrt(1 - beta2^step), or 1 and 1."""
    correction1 = 1.0
    correction2 = 1.0
    if BIAS_CORRECTION:
        step = scalar(row, STEP)
        correction1 = _one_minus_exp(step * log_beta1)
        correction2 = tl.sqrt(_one_minus_exp(step * log_beta2))
    return correction1, correction2


@triton.jit
def update_moments(
    grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask,
    grad_scale, beta1, beta2, weight1, weight2,
):  # fmt: skip
    """m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2, stored and returned."""
    g = load(grad_ptr + offsets, mask) / grad_scale
    m = load(exp_avg_ptr + offsets, mask)
    v = load(exp_avg_sq_ptr + offsets, mask)
    m = beta1 * m + weight1 * g
    v = beta2 * v + weight2 * g * g
    tl.store(exp_avg_ptr + offsets, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
    return m, v


@triton.jit
def direction(m, v, correction1, correction2, eps):
    """Adam's m / (sqrt(v) + eps), each moment over its correction."""
    return m / correction1 / (tl.sqrt(v) / correction2 + eps)
