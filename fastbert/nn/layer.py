"""One encoder layer on packed tokens, for native and Hugging Face models alike.

The layer is a function over *parts*: the modules that hold its parameters, whatever a model family
calls them. Parameters are read from the modules at every call, so ``.to()``, ``load_state_dict``,
FSDP and a LoRA that wraps one of the Linears all act as they do on the original model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert.ops import (
    add_layer_norm,
    attention,
    bias_gelu,
    embed_layer_norm,
    feed_forward,
    gather_rows,
    linear,
    qkv_linear,
)
from fastbert.ops._matmul import autocast_to
from fastbert.ops.attention import attention_reference
from fastbert.packed import PackedBatch

Tensor = torch.Tensor


class LayerParts(NamedTuple):
    """The modules of one post-LN encoder layer.

    activation: "none" (erf) or "tanh" for a GELU that is fused, else the callable itself.
    A dropout that a family does not have is None.
    """

    query: Any
    key: Any
    value: Any
    attention_output: Any
    attention_norm: Any
    up: Any
    down: Any
    output_norm: Any
    head_dim: int
    activation: str | Callable[[Tensor], Tensor]
    attention_dropout: Any = None
    attention_output_dropout: Any = None
    output_dropout: Any = None


@dataclass
class Pass:
    """What one forward pass carries from layer to layer beside the tokens.

    dropout_seed: int64 (1,), drawn once a pass; None when nothing is dropped. Each site of the
        model has its own offset in that stream: 0 the embeddings, 1 + 3 l + {0, 1, 2} those of
        layer l, so a layer that gradient checkpointing computes again drops the same elements.
    attentions: when not None, layers compute attention by the reference and append their
        probabilities, padded (B, N, S, S).
    bias: what every layer's attention adds to its scores, see ``fastbert.ops.attention``, or None.
    rows: (R,) int64, ascending: the packed tokens that the last layer goes on with behind its
        attention, which still sees all; None for all of them.
    """

    dropout_seed: Tensor | None = None
    attentions: list[Tensor] | None = None
    bias: Tensor | None = None
    rows: Tensor | None = None


def new_pass(module: nn.Module, device: torch.device, want_attentions: bool = False) -> Pass:
    """A Pass with a fresh seed from torch's generator of ``device`` if ``module`` is training."""
    seed = None
    if module.training:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return Pass(seed, [] if want_attentions else None)


def dropout_p(dropout: Any, training: bool) -> float:
    """The probability that a dropout part applies now."""
    if dropout is None or not training:
        return 0.0
    if isinstance(dropout, float | int):
        return float(dropout)
    return float(dropout.p) if dropout.training else 0.0


def is_plain_linear(module: Any) -> bool:
    """True for an ``nn.Linear`` that nothing has wrapped, parametrised or hooked: safe to fuse."""
    return type(module) is nn.Linear and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def project(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x W^T and the bias still to be added, or a wrapped module's own full output and None."""
    if is_plain_linear(module):
        return linear(x, module.weight), module.bias
    return module(x), None


def _project_qkv(parts: LayerParts, x: Tensor) -> Tensor:
    linears = (parts.query, parts.key, parts.value)
    if all(map(is_plain_linear, linears)):
        weights = tuple(m.weight for m in linears)
        return qkv_linear(x, weights, tuple(m.bias for m in linears))
    return torch.cat([m(x) for m in linears], 1)


def _attend(parts: LayerParts, qkv: Tensor, batch: PackedBatch, run: Pass, p: float, offset: int,
            bias: Tensor | None) -> Tensor:  # fmt: skip
    seed = run.dropout_seed if p > 0.0 else None
    if run.attentions is None:
        return attention(
            qkv, batch.cu_seqlens, batch.max_seqlen,
            dropout_p=p, dropout_seed=seed, dropout_offset=offset, bias=bias,
        )[0]  # fmt: skip
    scale = parts.head_dim**-0.5
    out, _, probabilities = attention_reference(
        qkv, batch.cu_seqlens, batch.max_seqlen, scale, p, seed, offset, bias
    )
    run.attentions.append(_padded_probabilities(probabilities, qkv, batch))
    return out


def _padded_probabilities(probabilities: list[Tensor], qkv: Tensor, batch: PackedBatch) -> Tensor:
    """(rows, N, S, S) from one (N, n, n) a sequence, each token back at its padded column."""
    rows, width = batch.padded_shape
    padded = qkv.new_zeros(rows, qkv.shape[2], width, width)
    indices = batch.indices
    if indices is None:
        indices = torch.arange(rows * width, device=qkv.device)
    start = 0
    for p, length in zip(probabilities, batch.lengths, strict=True):
        place = indices[start : start + length]
        if length:
            row, columns = int(place[0]) // width, place % width
            padded[row, :, columns[:, None], columns[None, :]] = p
        start += length
    return padded


def _feed_forward(parts: LayerParts, h: Tensor) -> tuple[Tensor, Tensor | None]:
    up, down, activation = parts.up, parts.down, parts.activation
    if isinstance(activation, str) and is_plain_linear(up) and is_plain_linear(down):
        return feed_forward(h, up.weight, up.bias, down.weight, approximate=activation), down.bias
    u, bias = project(up, h)
    if isinstance(activation, str):
        u = bias_gelu(u, bias, approximate=activation)
    else:
        u = activation(u if bias is None else u + bias)
    return project(down, u)


def _add_norm(norm: Any, y: Tensor, residual: Tensor, y_bias: Tensor | None, run: Pass,
              p: float, offset: int) -> Tensor:  # fmt: skip
    if residual.dtype != y.dtype:  # a wrapped Linear under autocast
        residual = residual.to(y.dtype)
    return add_layer_norm(
        y, residual, norm.weight, norm.bias, x_bias=y_bias, eps=norm.eps,
        dropout_p=p, dropout_seed=run.dropout_seed if p > 0.0 else None, dropout_offset=offset,
    )  # fmt: skip


def encoder_layer(
    parts: LayerParts,
    x: Tensor,
    batch: PackedBatch,
    run: Pass,
    index: int,
    training: bool,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """h = LN(x + dropout(attention(x) W_o + b_o)); y = LN(h + dropout(gelu(h W_1 + b_1) W_2 + b_2))
    (Vaswani et al., arXiv 1706.03762, section 3.1; Devlin et al., arXiv 1810.04805).

    x: (T, H).  index: depth of the layer, which fixes its dropout offsets.
    bias, rows: as in Pass, for this layer. What comes behind attention looks at one token at a
        time, so y is computed for some ``rows`` exactly; but its dropout is a function of the
        row's number among those computed, and so falls otherwise than for all tokens.
    Returns (T, H), or (R, H) for R rows.
    """
    tokens, site = x.shape[0], 1 + 3 * index
    qkv = _project_qkv(parts, x)
    qkv = qkv.view(tokens, 3, qkv.shape[1] // (3 * parts.head_dim), parts.head_dim)
    p = dropout_p(parts.attention_dropout, training)
    context = _attend(parts, qkv, batch, run, p, site, bias).flatten(1)
    if rows is not None:
        x, context = gather_rows(x, rows), gather_rows(context, rows)
    a, a_bias = project(parts.attention_output, context)
    p = dropout_p(parts.attention_output_dropout, training)
    h = _add_norm(parts.attention_norm, a, x, a_bias, run, p, site + 1)
    y, y_bias = _feed_forward(parts, h)
    p = dropout_p(parts.output_dropout, training)
    return _add_norm(parts.output_norm, y, h, y_bias, run, p, site + 2)


class EmbeddingParts(NamedTuple):
    """The modules of a BERT-like embedding; token_type, projection: None where there is none."""

    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding | None
    norm: Any
    dropout: Any
    projection: Any = None


def embed(parts: EmbeddingParts, batch: PackedBatch, run: Pass, training: bool) -> Tensor:
    """dropout(LN(word + position + token type)) and, in ELECTRA and ALBERT, a projection to H.

    Returns (T, H), in the autocast dtype inside an autocast region.
    """
    ids, word, padding_idx = batch.input_ids, parts.word.weight, parts.word.padding_idx
    device = batch.cu_seqlens.device
    if ids is None:
        # A caller's own embeddings are a table in which token t takes row t.
        assert batch.inputs_embeds is not None
        word, padding_idx = batch.inputs_embeds, None
        ids = torch.arange(word.shape[0], device=device)
    types = batch.token_type_ids
    if parts.token_type is not None and types is None:
        types = torch.zeros_like(ids)
    p = dropout_p(parts.dropout, training)
    assert batch.position_ids is not None
    x = embed_layer_norm(
        ids,
        batch.position_ids,
        types if parts.token_type is not None else None,
        word,
        parts.position.weight.to(word.dtype),
        None if parts.token_type is None else parts.token_type.weight.to(word.dtype),
        parts.norm.weight,
        parts.norm.bias,
        eps=parts.norm.eps,
        padding_idx=padding_idx,
        position_padding_idx=parts.position.padding_idx,
        dropout_p=p,
        dropout_seed=run.dropout_seed if p > 0.0 else None,
        dropout_offset=0,
    )
    (x,) = autocast_to(x)
    return x if parts.projection is None else parts.projection(x)


def run_layers(
    layers: Any, x: Tensor, batch: PackedBatch, run: Pass, want_hidden: bool = False
) -> tuple[Tensor, list[Tensor] | None]:
    """Layer after layer, each called as ``layer(x, batch, run, index)`` so that its hooks fire.

    Returns the last hidden state (T, H) and, if wanted, all L + 1 of them.
    """
    hidden = [x] if want_hidden else None
    for index, layer in enumerate(layers):
        x = layer(x, batch, run, index)
        if hidden is not None:
            hidden.append(x)
    return x, hidden
