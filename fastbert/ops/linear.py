"""linear: ``x w^T + b`` by the fastest route that this machine's BLAS offers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import differentiable
from fastbert.ops._matmul import are_plain, autocast_to, few_rows, has_own_route, mm, mm_t, widens


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """y = x w^T + b.

    x: (T, K).  w: (N, K).  b: (N,) or None, in x's dtype or fp32.  Returns (T, N); under autocast
    in the autocast dtype.  Raises ValueError for bad shapes, dtypes or devices.
    torch's own Linear, but for bf16 on a CPU without bf16 matrix units, where the products go
    through fp32 (see ``_matmul.widens``), and for few rows where BLAS is slow at them
    (``_matmul.few_rows``).
    """
    x, w = autocast_to(x, w)
    _check.activation("x", x, ("T", "K"))
    _check.like("w", w, x, (w.shape[0], x.shape[1]))
    _check.vector("b", b, x, w.shape[0])
    b = b if b is None or b.dtype == x.dtype else b.to(x.dtype)
    if torch.compiler.is_compiling():
        return traced_linear(x, w, b)
    # The same with and without gradients: a checkpoint computes forward in both ways.
    return _linear(x, w, b) if _has_route(x, w) else F.linear(x, w, b)


def traced_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x w^T + b as part of a graph of torch.compile: torch's own, which the compiler may fuse with
    what follows, but on a CPU with routes of ours an op that takes them when the graph runs."""
    if x.device.type == "cpu" and are_plain(x, w) and has_own_route(x.dtype):
        return _linear(x, w, b)
    return F.linear(x, w, b)


def _has_route(x: torch.Tensor, w: torch.Tensor) -> bool:
    return few_rows(x, w) or widens(x, min(*x.shape, w.shape[0]))


def _forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    if not _has_route(x, w):
        return F.linear(x, w, b)
    y = mm_t(x, w)
    return y if b is None else y.add_(b)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, want_x: bool, want_w: bool, want_b: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = mm(dy, w) if want_x else dy.new_empty(0)
    dw = mm(dy.t(), x) if want_w else dy.new_empty(0)
    return dx, dw, dy.sum(0) if want_b else dy.new_empty(0)


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, want_x: bool, want_w: bool, want_b: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x) if want_x else dy.new_empty(0)
    dw = torch.empty_like(w) if want_w else dy.new_empty(0)
    return dx, dw, dy.new_empty(w.shape[0] if want_b else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, backward: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    gradients = backward(dy, *ctx.saved_tensors, *wanted)
    return tuple(x if want else None for x, want in zip(gradients, wanted, strict=True))


_linear = differentiable(
    "linear",
    schema="(Tensor x, Tensor w, Tensor? b) -> Tensor",
    forward=_forward,
    fake=lambda x, w, b: x.new_empty(x.shape[0], w.shape[0]),
    backward_schema=(
        "(Tensor dy, Tensor x, Tensor w, bool want_x, bool want_w, bool want_b)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)
