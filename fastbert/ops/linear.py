"""linear: ``x w^T + b`` by the fastest route that this machine's BLAS offers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import wants_grad
from fastbert.ops._matmul import autocast_to, few_rows, mm, mm_t, widens


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
        return F.linear(x, w, b)
    # The same with and without gradients: a checkpoint computes forward in both ways.
    if not (few_rows(x, w) or widens(x, min(*x.shape, w.shape[0]))):
        return F.linear(x, w, b)
    if torch.is_grad_enabled() and wants_grad(x, w, b):
        return _Linear.apply(x, w, b)
    return _forward(x, w, b)


def _forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    y = mm_t(x, w)
    return y if b is None else y.add_(b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return _forward(x, w, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        want_x, want_w, want_b = ctx.needs_input_grad
        dx = mm(dy, w) if want_x else None
        dw = mm(dy.t(), x) if want_w else None
        return dx, dw, dy.sum(0) if want_b else None
