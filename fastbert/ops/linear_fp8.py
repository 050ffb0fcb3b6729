"""quantize_rows_fp8 and linear_fp8: a Linear whose products are those of e4m3 numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import define
from fastbert.ops._registry import OPS

_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}
LARGEST = 448.0  # of e4m3 without infinities (Micikevicius et al., arXiv 2209.05433, table 1)


def quantize_rows_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 by row, x_tk = scale_t q_tk: scale_t = max_k |x_tk| / 448, q_tk rounded half to even.

    x: (T, K) floating, finite.  Returns q (T, K) torch.float8_e4m3fn and scale (T,) fp32, 0 for a
    row of zeros.
    Not differentiable. Raises ValueError for a bad shape or dtype.
    """
    _check.activation("x", x, ("T", "K"))
    return (_compiled_rows if torch.compiler.is_compiling() else _launch_rows)(x)


def linear_fp8(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y_tn = act( (sum_k q_tk weight_nk) scale_t weight_scale_n + bias_n ).

    q: (T, K) torch.float8_e4m3fn, scale: (T,) fp32, as quantize_rows_fp8 makes them.  weight:
    (N, K), weight_scale: (N,): so of the weight.  bias: (N,) fp32 or None.  activation: "none",
    "gelu" or "gelu_tanh".  Returns (T, N) in ``dtype``; products are exact, their sum is fp32.
    For GPUs from sm_89 on, whose matrix units take e4m3; elsewhere a reference that is only right.
    Not differentiable. Raises ValueError for bad shapes, dtypes, devices or ``activation``.
    """
    _fp8("q", q, ("T", "K"), q.device)
    _fp8("weight", weight, ("N", q.shape[1]), q.device)
    for name, v, size in (
        ("scale", scale, q.shape[0]),
        ("weight_scale", weight_scale, weight.shape[0]),
        ("bias", bias, weight.shape[0]),
    ):
        _check.fp32(name, v, size, q.device)
    if activation not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {names}")
    if dtype not in _check.FLOATS:
        raise ValueError(f"dtype: got {dtype}, expected a floating-point dtype")
    call = _compiled if torch.compiler.is_compiling() else _launch
    return call(q, scale, weight, weight_scale, bias, _ACTIVATIONS[activation], dtype)


def _fp8(name: str, x: torch.Tensor, shape: tuple[int | str, ...], device: torch.device) -> None:
    fits = isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn and x.dim() == 2
    fits = fits and x.device == device
    if not fits or any(isinstance(n, int) and m != n for m, n in zip(x.shape, shape, strict=True)):
        expected = f"float8_e4m3fn of shape ({', '.join(map(str, shape))}) on {device}"
        raise ValueError(f"{name}: got {_check.describe(x)}, expected {expected}")


def quantize_rows_fp8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    limit = largest.new_full((1,), LARGEST)  # a tensor: see quantize_rows_reference
    inverse = torch.where(largest > 0, limit / largest, 0.0)
    return (x * inverse[:, None]).to(torch.float8_e4m3fn), largest / limit


def linear_fp8_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    y = (q.float() @ weight.float().t()) * scale[:, None] * weight_scale
    y = y if bias is None else y + bias
    if activation:
        y = F.gelu(y, approximate="tanh" if activation == _ACTIVATIONS["gelu_tanh"] else "none")
    return y.to(dtype)


def _launch_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return OPS["quantize_rows_fp8"].launcher("fwd", x, x.shape[1])(x.contiguous())


def _launch(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, activation: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    # The table knows floating activations: the output stands for the e4m3 input.
    like = scale.new_empty(0, dtype=dtype)
    tensors = (q, scale, weight, weight_scale, bias)
    return OPS["linear_fp8"].launcher("fwd", like, q.shape[1])(
        *(None if x is None else x.contiguous() for x in tensors), activation, dtype
    )


def _fake(q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return scale.new_empty(q.shape[0], weight.shape[0], dtype=rest[-1])


_compiled_rows = define(
    "quantize_rows_fp8",
    "(Tensor x) -> (Tensor, Tensor)",
    _launch_rows,
    lambda x: (
        torch.empty_like(x, dtype=torch.float8_e4m3fn),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
_compiled = define(
    "linear_fp8",
    "(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, int activation, "
    "ScalarType dtype) -> Tensor",
    _launch,
    _fake,
)
