"""The stack of post-LN layers, on packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import ACTIVATIONS, BertConfig
from fastbert.nn.layer import LayerParts, Pass, encoder_layer, run_layers
from fastbert.ops import gather_rows
from fastbert.packed import PackedBatch

_UNFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "silu": F.silu}


def activation(config: BertConfig) -> str | Callable[[torch.Tensor], torch.Tensor]:
    """``hidden_act`` as LayerParts takes it: "none" or "tanh" for a fused GELU, else a callable."""
    name = ACTIVATIONS[config.hidden_act]
    return _UNFUSED.get(name, name)


# The classes down to BertLayer hold parameters under the names that checkpoints have; BertLayer
# computes with all of them at once.


class _SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)


class _Output(nn.Module):
    """dense, dropout, and the LayerNorm of the sum with the residual."""

    def __init__(self, config: BertConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Output(config, config.hidden_size)


class _Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    """One encoder layer: see ``fastbert.nn.layer.encoder_layer`` for its equations."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)
        self.head_dim = config.head_dim
        self.activation = activation(config)

    def forward(self, x: torch.Tensor, batch: PackedBatch, run: Pass, index: int) -> torch.Tensor:
        """(T, H) -> (T, H), or (R, H) for the R rows of ``run``. index: the layer's depth, which
        fixes what dropout drops."""
        attention = self.attention
        parts = LayerParts(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            attention_output=attention.output.dense,
            attention_norm=attention.output.LayerNorm,
            up=self.intermediate.dense,
            down=self.output.dense,
            output_norm=self.output.LayerNorm,
            head_dim=self.head_dim,
            activation=self.activation,
            attention_dropout=attention.self.dropout,
            attention_output_dropout=attention.output.dropout,
            output_dropout=self.output.dropout,
        )
        return encoder_layer(
            parts, x, batch, run, index, self.training, bias=run.bias, rows=run.rows
        )


class BertEncoder(nn.Module):
    """``num_hidden_layers`` layers.

    gradient_checkpointing: in training keep only each layer's input and compute the layer again in
    backward (Chen et al., arXiv 1604.06174); dropout, a function of a counter, comes out the same.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self, x: torch.Tensor, batch: PackedBatch, run: Pass, want_hidden: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """(T, H) -> the last hidden state, (T, H) or (R, H) for R rows, and, if wanted, all L + 1.

        Only the last layer is shown ``run.rows``: those before it are read by attention.
        """
        layers: Any = list(self.layer)
        if self.gradient_checkpointing and self.training and run.attentions is None:
            # A layer computed twice would hand in its attention probabilities twice.
            layers = [partial(checkpoint, layer, use_reentrant=False) for layer in layers]
        if run.rows is None:
            return run_layers(layers, x, batch, run, want_hidden)
        if not layers:
            x = gather_rows(x, run.rows)
            return x, [x] if want_hidden else None
        *inner, last = layers
        x, hidden = run_layers(inner, x, batch, replace(run, rows=None), want_hidden)
        x = last(x, batch, run, len(inner))
        return x, None if hidden is None else [*hidden, x]
