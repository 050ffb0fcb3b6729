"""gather_rows and scatter_rows: between padded and packed, and to the rows that a head needs."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.ops import _check
from fastbert.ops._library import differentiable
from fastbert.ops._registry import OPS


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """y[m] = x[index[m]]; the gradient is scatter_rows.

    x: (R, H) floating.  index: (M,) int64, strictly ascending, in 0 .. R - 1.  Returns (M, H).
    Raises ValueError for bad shapes and, on CPU, an index that does not ascend or overruns. On a
    GPU the index is trusted to ascend, and rows out of range are never read.
    """
    _check.activation("x", x, ("R", "H"))
    _check.ids("index", index, "M", x.device)
    return _gather(x, index)


def scatter_rows(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """y[index[m]] = x[m], every other of the ``num_rows`` rows 0; the gradient is gather_rows.

    x: (M, H) floating.  index: (M,) int64, strictly ascending, in 0 .. num_rows - 1.  Returns
    (num_rows, H). Raises like gather_rows.
    """
    _check.activation("x", x, ("M", "H"))
    _check.ids("index", index, x.shape[0], x.device)
    if num_rows < 0:
        raise ValueError(f"num_rows: got {num_rows}, expected at least 0")
    return _scatter(x, index, num_rows)


def gather_rows_reference(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x[index]


def scatter_rows_reference(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x.new_zeros(num_rows, x.shape[1]).index_copy(0, index, x)


def _launch_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return OPS["gather_rows"].launcher("fwd", x, x.shape[1])(x.contiguous(), index)


def _launch_scatter(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    launch = OPS["scatter_rows"].launcher("fwd", x, x.shape[1])
    return launch(x.contiguous(), index, num_rows)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, index = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(index)


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


_gather = differentiable(
    "gather_rows",
    schema="(Tensor x, Tensor index) -> Tensor",
    forward=_launch_gather,
    fake=lambda x, index: x.new_empty(index.shape[0], x.shape[1]),
    backward_schema="(Tensor dy, Tensor index, SymInt num_rows) -> Tensor",
    backward=_launch_scatter,
    backward_fake=lambda dy, index, num_rows: dy.new_empty(num_rows, dy.shape[1]),
    save=_save_gather,
    gradients=lambda ctx, backward, dy: (backward(dy, *ctx.saved_tensors, ctx.num_rows), None),
)
_scatter = differentiable(
    "scatter_rows",
    schema="(Tensor x, Tensor index, SymInt num_rows) -> Tensor",
    forward=_launch_scatter,
    fake=lambda x, index, num_rows: x.new_empty(num_rows, x.shape[1]),
    backward_schema="(Tensor dy, Tensor index) -> Tensor",
    backward=_launch_gather,
    backward_fake=lambda dy, index: dy.new_empty(index.shape[0], dy.shape[1]),
    save=_save_scatter,
    gradients=lambda ctx, backward, dy: (backward(dy, *ctx.saved_tensors), None, None),
)
