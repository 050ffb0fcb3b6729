"""quantize_rows and linear_int8: a Linear whose products are those of int8 numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import define
from fastbert.ops._registry import OPS

_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 by row, x_tk = scale_t q_tk + offset_t: offset_t is the middle of the row's range,
    scale_t its 254th part, q_tk = round((x_tk - offset_t) / scale_t), halves to even (asymmetric
    quantisation, Jacob et al., arXiv 1712.05877, eq. 1, with a range a token and a zero point that
    is no integer).

    x: (T, K) floating, finite.  Returns q (T, K) int8 from -127 to 127, scale (T,) fp32, 0 for a
    row of one value, and offset (T,) fp32.
    Not differentiable. Raises ValueError for a bad shape or dtype.
    """
    _check.activation("x", x, ("T", "K"))
    if torch.compiler.is_compiling():
        return _compiled_rows(x)
    return _launch_rows(x)


def linear_int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    offset: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    output_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_tn = act( (sum_k q_tk weight_nk) scale_t weight_scale_n + offset_t column_sum_n + bias_n ).

    q: (T, K) int8, scale, offset: (T,) fp32, as quantize_rows makes them.  weight: (N, K) int8,
    weight_scale: (N,) fp32.  column_sum: (N,) fp32, weight_scale_n sum_k weight_nk, from
    ``column_sums``; given if and only if offset is.  bias: (N,) fp32 or None.  activation: "none",
    "gelu" or "gelu_tanh".  output_scale: (1,) fp32, the scale that the next linear_int8 knows its
    input by, or None.
    Returns (T, N) in ``dtype``; with output_scale int8, round(y / output_scale), halves to even,
    from -127 to 127. The sum over k is exact in int32, what follows is fp32.
    Not differentiable. Raises ValueError for bad shapes, dtypes, devices or ``activation``.
    """
    _int8("q", q, ("T", "K"))
    _int8("weight", weight, ("N", q.shape[1]))
    if (offset is None) != (column_sum is None):
        given, missing = ("column_sum", "offset") if offset is None else ("offset", "column_sum")
        raise ValueError(f"{missing}: got None, expected it beside {given}")
    for name, v, size in (
        ("scale", scale, q.shape[0]),
        ("offset", offset, q.shape[0]),
        ("column_sum", column_sum, weight.shape[0]),
        ("weight_scale", weight_scale, weight.shape[0]),
        ("bias", bias, weight.shape[0]),
        ("output_scale", output_scale, 1),
    ):
        _check.fp32(name, v, size, q.device)
    if weight.device != q.device:
        raise ValueError(f"weight: got {_check.describe(weight)}, expected it on {q.device}")
    if activation not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {names}")
    if dtype not in _check.FLOATS:
        raise ValueError(f"dtype: got {dtype}, expected a floating-point dtype")
    call = _compiled if torch.compiler.is_compiling() else _launch
    return call(
        q, scale, weight, weight_scale, bias, offset, column_sum, _ACTIVATIONS[activation], dtype,
        output_scale,
    )  # fmt: skip


def column_sums(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """weight_scale_n sum_k weight_nk: what linear_int8 adds for each unit of a row's offset.

    weight: (N, K) int8.  weight_scale: (N,) fp32.  Returns (N,) fp32.
    """
    return weight_scale * weight.sum(1, dtype=torch.int32).float()


def _int8(name: str, x: torch.Tensor, shape: tuple[int | str, ...]) -> None:
    fits = isinstance(x, torch.Tensor) and x.dtype == torch.int8 and x.dim() == len(shape)
    if not fits or any(isinstance(n, int) and m != n for m, n in zip(x.shape, shape, strict=True)):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: got {_check.describe(x)}, expected int8 of shape ({expected})")


def quantize_rows_reference(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.float()
    low, high = x.aminmax(dim=1) if x.shape[1] else x.new_zeros(2, x.shape[0])
    half, offset = 0.5 * high - 0.5 * low, 0.5 * high + 0.5 * low
    # Not 127.0 / half, which torch computes as a product with the reciprocal, rounded twice.
    limit = half.new_full((1,), 127.0)
    inverse = torch.where(half > 0, limit / half, 0.0)
    q = ((x - offset[:, None]) * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return q, half / limit, offset


def linear_int8_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    activation: int,
    dtype: torch.dtype,
    output_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    sums = (q.double() @ weight.double().t()).float()  # below 2^53, so exact
    shift = torch.zeros_like(weight_scale) if bias is None else bias
    if offset is not None and column_sum is not None:
        shift = offset[:, None] * column_sum + shift
    y = sums * (scale[:, None] * weight_scale) + shift
    if activation:
        y = F.gelu(y, approximate="tanh" if activation == _ACTIVATIONS["gelu_tanh"] else "none")
    if output_scale is not None:
        return (y * (1 / output_scale)).round().clamp(-127, 127).to(torch.int8)
    return y.to(dtype)


def _launch_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return OPS["quantize_rows"].launcher("fwd", x, x.shape[1])(x.contiguous())


def _launch(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, offset: torch.Tensor | None, column_sum: torch.Tensor | None,
    activation: int, dtype: torch.dtype, output_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    # The table knows floating activations: the output stands for the int8 input.
    like = q.new_empty(0, dtype=dtype)
    tensors = (q, scale, weight, weight_scale, bias, offset, column_sum)
    return OPS["linear_int8"].launcher("fwd", like, q.shape[1])(
        *(None if x is None else x.contiguous() for x in tensors), activation, dtype, output_scale
    )


def _fake(q: torch.Tensor, scale: Any, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_, dtype, output_scale = rest
    stored = dtype if output_scale is None else torch.int8
    return q.new_empty(q.shape[0], weight.shape[0], dtype=stored)


_compiled_rows = define(
    "quantize_rows",
    "(Tensor x) -> (Tensor, Tensor, Tensor)",
    _launch_rows,
    lambda x: (
        torch.empty_like(x, dtype=torch.int8),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
_compiled = define(
    "linear_int8",
    "(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? offset, "
    "Tensor? column_sum, int activation, ScalarType dtype, Tensor? output_scale) -> Tensor",
    _launch,
    _fake,
)
