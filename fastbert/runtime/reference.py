"""The engine in numpy: the native one's equations, and its stand-in where none is built.

Slow, and one thread; same constructor, same ``run``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

_F32_EXACT = (1 << 24) // 127**2  # so many products of int8 add up exactly in fp32


def erf(x: Array) -> Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26), in float64."""
    z = np.abs(x.astype(np.float64))
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = np.polyval((1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592), t)
    return np.copysign(1.0 - series * t * np.exp(-z * z), x)


def _gelu(x: Array) -> Array:
    return (0.5 * x * (1.0 + erf(x * 0.5**0.5))).astype(np.float32)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": _silu,
    "tanh": np.tanh,
}


def widen(x: Array) -> Array:
    """fp32 from fp32 or from bf16 held as uint16."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight + bias


def quantize_rows(x: Array, input_scale: float | None = None) -> tuple[Array, Array, Array]:
    """q (T, K), int8 values as float, scale (T) and offset (T), with x = scale q + offset.

    The middle and the 254th part of each row's range; with ``input_scale`` that, and no offset.
    """
    if input_scale is None:
        high, low = np.float32(0.5) * x.max(1), np.float32(0.5) * x.min(1)
        half, offset = high - low, high + low
        scale = half / np.float32(127)
        with np.errstate(divide="ignore"):
            inverse = np.where(half > 0, np.float32(127) / half, np.float32(0))
    else:
        scale = np.full(len(x), input_scale, np.float32)
        inverse, offset = np.float32(1) / scale, np.zeros(len(x), np.float32)
    return np.clip(np.rint((x - offset[:, None]) * inverse[:, None]), -127, 127), scale, offset


def linear(tensors: dict[str, Array], name: str, x: Array) -> Array:
    """y (T, N) of x (T, K): integers where the weight is int8, else fp32."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if weight.dtype != np.int8:
        return x @ widen(weight).T + bias
    multiplier, fixed = (tensors.get(f"{name}.{x}") for x in ("input_multiplier", "input_scale"))
    if multiplier is not None:
        x = x * multiplier
    q, scale, offset = quantize_rows(x, None if fixed is None else float(fixed[0]))
    wide = np.float32 if weight.shape[1] <= _F32_EXACT else np.float64
    total = (q.astype(wide) @ weight.T.astype(wide)).astype(np.float32)
    weight_scale = tensors[f"{name}.weight_scale"]
    column_sum = weight_scale * weight.sum(1, dtype=np.int32).astype(np.float32)
    return total * (scale[:, None] * weight_scale) + (offset[:, None] * column_sum + bias)


def _attention(qkv: Array, cu_seqlens: Array, head_dim: int) -> Array:
    out = np.empty((len(qkv), qkv.shape[1] // 3), np.float32)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if start == end:
            continue
        q, k, v = qkv[start:end].reshape(end - start, 3, -1, head_dim).transpose(1, 2, 0, 3)
        scores = (q @ k.transpose(0, 2, 1)) * np.float32(head_dim**-0.5)
        scores = np.exp(scores - scores.max(2, keepdims=True))
        context = (scores / scores.sum(2, keepdims=True)) @ v
        out[start:end] = context.transpose(1, 0, 2).reshape(end - start, -1)
    return out


class ReferenceEngine:
    """See ``fastbert.runtime.engine.build`` for the arguments."""

    isa = "numpy"

    def __init__(self, config: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.config = config
        self.tensors = tensors
        norm = (
            f"layers.{config['layers'][0]}.output_norm" if config["layers"] else "embeddings.norm"
        )
        self.hidden_size = len(tensors[f"{norm}.weight"])
        self.num_layers = len(config["layers"])
        self.packed_bytes = 0

    def run(
        self,
        input_ids: Array | None,
        position_ids: Array,
        token_type_ids: Array | None,
        cu_seqlens: Array,
        out: Array,
        hidden_states: Array | None,
        word_rows: Array | None,
        num_threads: int,
    ) -> None:
        x = self._embed(input_ids, position_ids, token_type_ids, word_rows)
        for depth, layer in enumerate(self.config["layers"]):
            if hidden_states is not None:
                hidden_states[depth] = x
            x = self._layer(f"layers.{layer}.", x, cu_seqlens)
        if hidden_states is not None:
            hidden_states[-1] = x
        out[:] = x

    def _embed(
        self, ids: Array | None, positions: Array, types: Array | None, word_rows: Array | None
    ) -> Array:
        if ids is not None:
            x = self._rows("word", "input_ids", ids)
        else:
            assert word_rows is not None
            x = word_rows
        x = x + self._rows("position", "position_ids", positions)
        if "embeddings.token_type" in self.tensors:
            types = np.zeros_like(positions) if types is None else types
            x = x + self._rows("token_type", "token_type_ids", types)
        x = self._norm("embeddings.norm", x)
        if "embeddings.projection.weight" in self.tensors:
            x = linear(self.tensors, "embeddings.projection", x)
        return x

    def _rows(self, table: str, argument: str, ids: Array) -> Array:
        rows = self.tensors[f"embeddings.{table}"]
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(rows):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"{argument}: got {wrong}, expected 0 .. {len(rows) - 1}")
        return widen(rows[ids])

    def _norm(self, name: str, x: Array) -> Array:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, weight, bias, self.config["layer_norm_eps"])

    def _layer(self, prefix: str, x: Array, cu_seqlens: Array) -> Array:
        qkv = linear(self.tensors, prefix + "qkv", x)
        context = _attention(qkv, cu_seqlens, self.config["head_dim"])
        h = linear(self.tensors, prefix + "attention_output", context)
        h = self._norm(prefix + "attention_norm", h + x)
        u = ACTIVATIONS[self.config["activation"]](linear(self.tensors, prefix + "up", h))
        return self._norm(prefix + "output_norm", linear(self.tensors, prefix + "down", u) + h)
