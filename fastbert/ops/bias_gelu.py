"""bias_gelu: ``y = gelu(x + bias)``, the activation between a layer's two feed-forward matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import differentiable
from fastbert.ops._registry import OPS

_OP = OPS["bias_gelu"]


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> torch.Tensor:
    """GELU of ``u = x + bias`` (Hendrycks and Gimpel, arXiv 1606.08415, section 2).

    ``approximate="none"``: y = u/2 * (1 + erf(u / sqrt 2)), Hugging Face's ``gelu``;
    ``approximate="tanh"``: y = u/2 * (1 + tanh(sqrt(2/pi) * (u + 0.044715 u^3))), Google's.

    x: (..., I) floating.  bias: (I,) in the dtype of x or fp32.  Returns (..., I) in x's dtype.
    Arithmetic in fp32 (fp64 for fp64). Backward keeps x and bias only and recomputes u.
    Raises ValueError for a wrong shape, dtype, device or ``approximate``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
    if not isinstance(x, torch.Tensor) or x.dtype not in _check.FLOATS or x.dim() == 0:
        raise ValueError(f"x: got {_check.describe(x)}, expected a floating tensor (..., I)")
    _check.vector("bias", bias, x, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    return _bias_gelu(rows, bias, approximate == "tanh").view(x.shape)


def bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    u = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(u, approximate="tanh" if tanh else "none")


def launch_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    return _OP.launcher("fwd", x, x.shape[1])(x, bias, tanh)


def launch_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _OP.launcher("bwd", x, x.shape[1])(dy.contiguous(), x, bias, tanh)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dbias = launch_backward(dy, x, bias, tanh)
    return dx, x.new_empty(0) if dbias is None else dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, backward: Any, dy: torch.Tensor) -> Any:
    x, bias = ctx.saved_tensors
    dx, dbias = backward(dy, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


_bias_gelu = differentiable(
    "bias_gelu",
    schema="(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    forward=launch_forward,
    fake=lambda x, bias, tanh: torch.empty_like(x),
    backward_schema="(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
    backward=_backward,
    backward_fake=lambda dy, x, bias, tanh: (
        torch.empty_like(x),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    ),
    save=_save,
    gradients=_gradients,
)
