"""The quantised encoder through torch: where the tokens are on a GPU, and to watch activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import (
    add_layer_norm,
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


def encode(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    batch: PackedBatch,
    want_hidden: bool = False,
    linear: Linear | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """The last hidden state, (T, H) fp32, and all L + 1 of them if wanted.

    config, tensors: as the engine takes them, bf16 or fp32 as such.  linear: what stands in for the
    Linears; None computes them as they are stored.
    """
    linear = linear or partial(stored_linear, tensors)
    x = _embed(config, tensors, batch, linear)
    hidden = [x]
    for layer in config["layers"]:
        x = _layer(config, tensors, f"layers.{layer}.", x, batch, linear)
        hidden.append(x)
    return x, hidden if want_hidden else None


def _embed(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], batch: PackedBatch, linear: Linear
) -> Tensor:
    if batch.input_ids is not None:
        rows = F.embedding(batch.input_ids, tensors["embeddings.word"]).float()
    else:
        assert batch.inputs_embeds is not None
        rows = batch.inputs_embeds.float()
    index = torch.arange(len(rows), device=rows.device)
    token_type, types = tensors.get("embeddings.token_type"), batch.token_type_ids
    if token_type is not None:
        token_type = token_type.float()
        types = torch.zeros_like(index) if types is None else types
    assert batch.position_ids is not None
    x = embed_layer_norm(
        index,
        batch.position_ids,
        None if token_type is None else types,
        rows,
        tensors["embeddings.position"].float(),
        token_type,
        tensors["embeddings.norm.weight"],
        tensors["embeddings.norm.bias"],
        eps=config["layer_norm_eps"],
    )
    return linear("embeddings.projection", x) if "embeddings.projection.weight" in tensors else x


def _layer(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, x: Tensor,
    batch: PackedBatch, linear: Linear,
) -> Tensor:  # fmt: skip
    def norm(name: str, y: Tensor, residual: Tensor) -> Tensor:
        weight, bias = tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"]
        return add_layer_norm(y, residual, weight, bias, eps=config["layer_norm_eps"])

    qkv = linear(prefix + "qkv", x)
    heads = qkv.shape[1] // (3 * config["head_dim"])
    qkv = qkv.view(len(x), 3, heads, config["head_dim"])
    context = attention(qkv, batch.cu_seqlens, batch.max_seqlen)[0].flatten(1)
    h = norm("attention_norm", linear(prefix + "attention_output", context), x)
    u = _ACTIVATIONS[config["activation"]](linear(prefix + "up", h))
    return norm("output_norm", linear(prefix + "down", u), h)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda u: bias_gelu(u, None, approximate="none"),
    "gelu_tanh": lambda u: bias_gelu(u, None, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def stored_linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """y of x by the Linear ``name`` as it is stored: int8 or floating."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if weight.dtype != torch.int8:
        return F.linear(x, weight.float(), bias)
    scale, fixed = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.input_scale")
    multiplier = tensors.get(f"{name}.input_multiplier")
    if multiplier is not None:
        x = x * multiplier
    return quantized_linear(x, weight, scale, bias, fixed)


def quantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """y[t, n] = sum_k x[t, k] weight[n, k] weight_scale[n] + bias[n], with x in int8.

    x: (T, K) fp32, quantised as ``quantize_rows`` does; or, where ``input_scale`` (1) is given, as
    round(x / input_scale).  weight: (N, K) int8.  weight_scale, bias: (N) fp32.  The integer sum is
    exact.
    """
    if input_scale is not None:
        q = (x * (1 / input_scale)).round().clamp(-127, 127).to(torch.int8)
        scale = input_scale.expand(len(x)).contiguous()
        return linear_int8(q, scale, weight, weight_scale, bias)
    q, scale, offset = quantize_rows(x)
    sums = column_sums(weight, weight_scale)
    return linear_int8(q, scale, weight, weight_scale, bias, offset=offset, column_sum=sums)
