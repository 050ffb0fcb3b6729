"""add_layer_norm: ``LN(residual + dropout(x + x_bias))``, the end of both halves of a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check, philox
from fastbert.ops._library import define, differentiable, wants_grad
from fastbert.ops._registry import OPS

_OP = OPS["add_layer_norm"]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    x_bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    dropout_offset: int = 0,
) -> torch.Tensor:
    """Post-LN residual block: z = residual + dropout(x + x_bias), y = (z - E z) / sqrt(Var z + eps)
    * weight + bias, over the last dimension (Ba et al., arXiv 1607.06450, eq. 4; Devlin et al.,
    arXiv 1810.04805, for the place of the dropout).

    x, residual: (T, H), one dtype; residual may be None.  weight, bias, x_bias: (H,) in that dtype
    or fp32; ``x_bias`` is the bias of the Linear that made x.  Returns (T, H) in x's dtype.
    dropout: kept elements times 1/(1 - dropout_p), by the Philox stream of ``ops.philox`` at
    (dropout_seed, dropout_offset); ``dropout_seed`` is an int64 tensor of one element.
    Statistics in fp32 (fp64 for fp64), variance in two passes over z as rounded to x's dtype.
    Backward keeps z, the mean and 1/std. Raises ValueError for bad shapes, dtypes or dropout_p.
    """
    _check_tensors(x, residual, weight, bias, x_bias)
    _check.dropout(dropout_p, dropout_seed, x)
    save = torch.is_grad_enabled() and wants_grad(x, residual, x_bias, weight, bias)
    return _add_layer_norm(
        x, residual, x_bias, weight, bias, eps, dropout_p, dropout_seed, dropout_offset, save
    )[0]


def add_layer_norm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    x_bias: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """add_layer_norm without dropout and, in the same pass, the rows of y for a linear_int8.

    Arguments as in ``add_layer_norm``; multiplier: (H,) fp32, what the rows alone are multiplied by
    (the inverse of SmoothQuant's s, Xiao et al., arXiv 2211.10438, eq. 3), or None.
    Returns y (T, H) in x's dtype, and q (T, H) int8, scale and offset (T,) fp32:
    ``quantize_rows(y.float() * multiplier)``, the same bits.
    Not differentiable. Raises ValueError for bad shapes or dtypes.
    """
    _check_tensors(x, residual, weight, bias, x_bias)
    _check.fp32("multiplier", multiplier, x.shape[1], x.device)
    call = _compiled_int8 if torch.compiler.is_compiling() else _launch_int8
    return call(x, residual, x_bias, weight, bias, multiplier, eps)


def _check_tensors(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x_bias: torch.Tensor | None,
) -> None:
    _check.activation("x", x, ("T", "H"))
    _check.like("residual", residual, x, tuple(x.shape))
    for name, v in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        _check.vector(name, v, x, x.shape[1])


def add_residual_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> torch.Tensor:
    """z = residual + dropout(x + x_bias)"""
    z = x if x_bias is None else x + x_bias.to(x.dtype)
    z = philox.dropout(z, dropout_p, dropout_seed, dropout_offset)
    return z if residual is None else residual + z


def layer_norm_reference(
    z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return F.layer_norm(z, (z.shape[1],), weight.to(z.dtype), bias.to(z.dtype), eps)


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    launch = _OP.launcher("fwd", x, x.shape[1])
    y, z, mean, rstd = launch(
        x, residual, x_bias, weight, bias, eps, dropout_p, dropout_seed, dropout_offset, save,
    )  # fmt: skip
    if z is None:
        z, mean, rstd = (x.new_empty(0) for _ in range(3))
    return y, z, mean, rstd


def _fake(x: torch.Tensor, residual: Any, x_bias: Any, weight: Any, bias: Any, eps: float,
          p: float, seed: Any, offset: int, save: bool) -> Any:  # fmt: skip
    if not save:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    statistic = x.new_empty(x.shape[0], dtype=_statistic_dtype(x))
    return torch.empty_like(x), torch.empty_like(x), statistic, torch.empty_like(statistic)


def _statistic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    x_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dz, dx, dweight, dbias, dx_bias = _OP.launcher("bwd", z, z.shape[1])(
        dy.contiguous(), z, weight, mean, rstd, dropout_p, dropout_seed, dropout_offset,
        x_bias is not None,
    )  # fmt: skip
    # Without dropout dx is dz itself; a library op may not return one tensor twice.
    dx = z.new_empty(0) if dropout_p == 0.0 else dx
    dx_bias = z.new_empty(0) if x_bias is None else dx_bias.to(x_bias.dtype)
    return dz, dx, dweight, dbias, dx_bias


def _backward_fake(dy: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, mean: Any, rstd: Any,
                   p: float, seed: Any, offset: int, x_bias: Any) -> Any:  # fmt: skip
    none = z.new_empty(0)
    return (
        torch.empty_like(z),
        none if p == 0.0 else torch.empty_like(z),
        torch.empty_like(weight),
        torch.empty_like(weight),
        z.new_empty(0) if x_bias is None else torch.empty_like(x_bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, residual, x_bias, weight, _, _, ctx.dropout_p, seed, ctx.dropout_offset, _ = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(*output[1:], weight, x_bias, seed)


def _gradients(ctx: Any, backward: Any, dy: torch.Tensor, *ignored: Any) -> Any:
    z, mean, rstd, weight, x_bias, seed = ctx.saved_tensors
    dz, dx, dweight, dbias, dx_bias = backward(
        dy, z, weight, mean, rstd, ctx.dropout_p, seed, ctx.dropout_offset, x_bias
    )
    return (
        dz if ctx.dropout_p == 0.0 else dx,
        dz if ctx.has_residual else None,
        None if x_bias is None else dx_bias,
        dweight,
        dbias,
        *(None,) * 5,
    )


_add_layer_norm = differentiable(
    "add_layer_norm",
    schema="(Tensor x, Tensor? residual, Tensor? x_bias, Tensor weight, Tensor bias, float eps, "
    "float dropout_p, Tensor? dropout_seed, int dropout_offset, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    backward_schema="(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? dropout_seed, int dropout_offset, Tensor? x_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def _launch_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    multiplier: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (x, residual, x_bias, weight, bias, multiplier)
    return OPS["add_layer_norm_int8"].launcher("fwd", x, x.shape[1])(
        *(None if t is None else t.contiguous() for t in tensors), eps
    )


_compiled_int8 = define(
    "add_layer_norm_int8",
    "(Tensor x, Tensor? residual, Tensor? x_bias, Tensor weight, Tensor bias, Tensor? multiplier, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_int8,
    lambda x, *rest: (
        torch.empty_like(x),
        torch.empty_like(x, dtype=torch.int8),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
