"""The quantised encoder through torch: where the tokens are on a GPU, and to watch activations.

Between two int8 Linears on a GPU, what stands where quantisation could be a pass of its own: after
a LayerNorm the rows leave its kernel in int8; after the up projection GELU is in the product's
epilogue, and so is rounding where the down projection has one scale for all tokens. A scale a token
needs the whole row of 4 H numbers, which no tile of a product has: there, and after attention, one
more pass reads the activation and writes it in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastbert.ops import (
    add_layer_norm,
    add_layer_norm_int8,
    attention,
    bias_gelu,
    column_sums,
    embed_layer_norm,
    linear_int8,
    quantize_rows,
)
from fastbert.packed import PackedBatch

Tensor = torch.Tensor
Linear = Callable[[str, Tensor], Tensor]
"""(name of a Linear, its input x (T, K)) -> its output (T, N)."""


class Rows(NamedTuple):
    """The input of an int8 Linear: q (T, K) int8, scale (T,), offset (T,) or None where it is 0."""

    q: Tensor
    scale: Tensor
    offset: Tensor | None


def encode(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    batch: PackedBatch,
    want_hidden: bool = False,
    linear: Linear | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor] | None]:
    """The last hidden state, (T, H) fp32, and all L + 1 of them if wanted.

    config, tensors: as the engine takes them, bf16 or fp32 as such, or ``with_column_sums``.
    linear: what stands in for the Linears; None computes them as they are stored.  dtype: of the
    activations between the kernels.
    """
    parts = _Stored(config, tensors, dtype)
    if linear is not None:
        parts = _Watched(config, tensors, dtype, linear)
    prefixes = [f"layers.{layer}." for layer in config["layers"]]
    x = _embed(batch, parts)
    given: Tensor | Rows = x
    hidden = [x.float()]
    for prefix, following in zip(prefixes, [*prefixes[1:], None], strict=True):
        x, given = _layer(prefix, following, x, given, batch, parts)
        hidden.append(x.float())
    return hidden[-1], hidden if want_hidden else None


def with_column_sums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` and, for every int8 Linear, its ``column_sums``: once, not with every batch."""
    owners = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    sums = {
        f"{name}.column_sum": column_sums(
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        )
        for name in owners
    }
    return {**tensors, **sums}


def _embed(batch: PackedBatch, parts: _Stored) -> Tensor:
    tensors, dtype = parts.tensors, parts.dtype
    if batch.input_ids is not None:
        rows = F.embedding(batch.input_ids, tensors["embeddings.word"]).to(dtype)
    else:
        assert batch.inputs_embeds is not None
        rows = batch.inputs_embeds.to(dtype)
    index = torch.arange(len(rows), device=rows.device)
    token_type, types = tensors.get("embeddings.token_type"), batch.token_type_ids
    if token_type is not None:
        token_type = token_type.to(dtype)
        types = torch.zeros_like(index) if types is None else types
    assert batch.position_ids is not None
    x = embed_layer_norm(
        index,
        batch.position_ids,
        None if token_type is None else types,
        rows,
        tensors["embeddings.position"].to(dtype),
        token_type,
        tensors["embeddings.norm.weight"],
        tensors["embeddings.norm.bias"],
        eps=parts.config["layer_norm_eps"],
    )
    if "embeddings.projection.weight" not in tensors:
        return x
    return parts.floating("embeddings.projection", x)


def _layer(
    prefix: str, following: str | None, x: Tensor, given: Tensor | Rows,
    batch: PackedBatch, parts: _Stored,
) -> tuple[Tensor, Tensor | Rows]:  # fmt: skip
    """A layer's output, and the same as the qkv projection of the layer ``following`` wants it;
    ``given`` is x as this one does."""
    qkv = parts.floating(prefix + "qkv", given)
    qkv = qkv.view(len(x), 3, -1, parts.config["head_dim"])
    context = attention(qkv, batch.cu_seqlens, batch.max_seqlen)[0].flatten(1)
    y = parts.floating(prefix + "attention_output", context)
    h, given = parts.norm(prefix + "attention_norm", y, x, prefix + "up")
    u = parts.linear(prefix + "up", given, parts.config["activation"], prefix + "down")
    y = parts.floating(prefix + "down", u)
    return parts.norm(prefix + "output_norm", y, h, following and following + "qkv")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "gelu": lambda u: bias_gelu(u, None, approximate="none"),
    "gelu_tanh": lambda u: bias_gelu(u, None, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_FUSED_ACTIVATIONS = ("none", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class _Stored:
    """The Linears and LayerNorms as they are stored; each is told which Linear reads its output,
    and hands it that in the form it wants."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def linear(
        self, name: str, x: Tensor | Rows, activation: str = "none", reader: str | None = None
    ) -> Tensor | Rows:
        """act(x W^T + bias); rows in int8 where ``reader`` has one scale for all tokens."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        act = _ACTIVATIONS[activation]
        if weight.dtype != torch.int8:
            assert isinstance(x, Tensor)
            return act(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
        rows = x if isinstance(x, Rows) else self._rows(name, x)
        scale, sums = self.tensors[f"{name}.weight_scale"], None
        if rows.offset is not None:
            sums = self.tensors.get(f"{name}.column_sum")
            sums = column_sums(weight, scale) if sums is None else sums
        fused = activation in _FUSED_ACTIVATIONS
        fixed = self._fixed_scale(reader) if fused else None
        y = linear_int8(
            rows.q, rows.scale, weight, scale, bias, offset=rows.offset, column_sum=sums,
            activation=activation if fused else "none", dtype=self.dtype, output_scale=fixed,
        )  # fmt: skip
        if fixed is not None:
            return Rows(y, fixed.expand(len(y)).contiguous(), None)
        return y if fused else act(y)

    def floating(self, name: str, x: Tensor | Rows) -> Tensor:
        """``linear`` for a reader that is none."""
        y = self.linear(name, x)
        assert isinstance(y, Tensor)
        return y

    def norm(
        self, name: str, y: Tensor, residual: Tensor, reader: str | None
    ) -> tuple[Tensor, Tensor | Rows]:
        """LayerNorm(y + residual), and that as ``reader`` wants it."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        eps = self.config["layer_norm_eps"]
        if not self._scales_each_token(reader):
            h = add_layer_norm(y, residual, weight, bias, eps=eps)
            return h, h
        multiplier = self.tensors.get(f"{reader}.input_multiplier")
        h, *rows = add_layer_norm_int8(y, residual, weight, bias, multiplier=multiplier, eps=eps)
        return h, Rows(*rows)

    def _rows(self, name: str, x: Tensor) -> Rows:
        multiplier = self.tensors.get(f"{name}.input_multiplier")
        x = x if multiplier is None else x.float() * multiplier
        return to_rows(x, self.tensors.get(f"{name}.input_scale"))

    def _fixed_scale(self, reader: str | None) -> Tensor | None:
        """The scale of ``reader``'s input, where that is one for all tokens and all there is."""
        if f"{reader}.input_multiplier" in self.tensors:
            return None
        return self.tensors.get(f"{reader}.input_scale")

    def _scales_each_token(self, reader: str | None) -> bool:
        static = f"{reader}.input_scale" in self.tensors
        return f"{reader}.weight_scale" in self.tensors and not static


@dataclass(frozen=True)
class _Watched(_Stored):
    """Other Linears in place of the stored ones, which see their inputs in floating point."""

    stand_in: Linear

    def linear(
        self, name: str, x: Tensor | Rows, activation: str = "none", reader: str | None = None
    ) -> Tensor | Rows:
        assert isinstance(x, Tensor)
        return _ACTIVATIONS[activation](self.stand_in(name, x))

    def _scales_each_token(self, reader: str | None) -> bool:
        return False


def to_rows(x: Tensor, input_scale: Tensor | None = None) -> Rows:
    """x (T, K) in int8: as ``quantize_rows`` does or, where ``input_scale`` (1) is given, as
    round(x / input_scale)."""
    if input_scale is None:
        return Rows(*quantize_rows(x))
    q = (x.float() * (1 / input_scale)).round().clamp(-127, 127).to(torch.int8)
    return Rows(q, input_scale.expand(len(x)).contiguous(), None)


def quantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """y[t, n] = sum_k x[t, k] weight[n, k] weight_scale[n] + bias[n], with x ``to_rows``.

    x: (T, K) fp32.  weight: (N, K) int8.  weight_scale, bias: (N) fp32.  The integer sum is exact.
    """
    rows = to_rows(x, input_scale)
    sums = None if rows.offset is None else column_sums(weight, weight_scale)
    return linear_int8(
        rows.q, rows.scale, weight, weight_scale, bias, offset=rows.offset, column_sum=sums
    )
