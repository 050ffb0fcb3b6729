"""The encoder as pretraining runs it: with attention masks, and for the rows that heads ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.models import BertModel
from fastbert.nn import BertLayer
from fastbert.nn.layer import LayerParts, Pass, dropout_p, new_pass, project
from fastbert.nn.layer import _add_norm as add_norm
from fastbert.nn.layer import _feed_forward as feed_forward
from fastbert.nn.layer import _project_qkv as project_qkv
from fastbert.ops import attention, gather_rows
from fastbert.packed import PackedBatch
from fastbert.pretrain.collate import PretrainingBatch

Tensor = torch.Tensor

UNSEEN = 1 << 30  # seen_from: no other token is so far on
ALONE = -1  # block: of no block


def visibility(
    rows: int,
    *,
    seen_from: int | np.ndarray,
    sees_to: int | np.ndarray,
    block: int | np.ndarray = ALONE,
) -> np.ndarray:
    """(rows, 3) int64, of ``rows`` tokens: token i sees token j of its sequence if

    seen_from_j <= sees_to_i   or   block_i = block_j, and that is not ALONE.
    """
    return np.stack([np.broadcast_to(x, rows) for x in (seen_from, sees_to, block)], 1)


def attention_bias(seen: Tensor, batch: PackedBatch) -> Tensor:
    """(1, T, max_seqlen) fp32: 0 where the query token, a row, sees the key at that place in its
    sequence, a column; else -inf.  seen: (T, 3), see ``visibility``."""
    numbers, lengths = torch.arange(batch.num_sequences), torch.tensor(batch.lengths)
    sequence = torch.repeat_interleave(numbers, lengths)
    sequence = sequence.to(seen.device, non_blocking=True)
    seen = seen.int()  # half the memory of what comes next
    keys = batch.unpack(seen, UNSEEN)[sequence]  # (T, max_seqlen, 3)
    visible = keys[..., 0] <= seen[:, 1, None]
    visible |= (keys[..., 2] == seen[:, 2, None]) & (seen[:, 2, None] != ALONE)
    return torch.zeros((), device=seen.device).where(visible, float("-inf"))[None]


def encode(bert: BertModel, batch: PretrainingBatch) -> Tensor:
    """The last hidden state, (R, H), of the rows that the batch asks for, or of all T tokens.

    ``bert`` has PretrainingLayers (``prepare_encoder``). Without rows and visibility this is
    ``bert.encode``; with rows the same numbers for fewer of them, but that dropout falls otherwise.
    """
    inputs = batch.inputs
    device = inputs.cu_seqlens.device
    bias = None
    if batch.visibility is not None:
        bias = attention_bias(batch.visibility, inputs)
    last = len(bert.encoder.layer) - 1
    run = PretrainingPass(new_pass(bert, device).dropout_seed, None, batch.rows, bias, last)
    x = bert.embeddings(_as_single_tokens(inputs) if bias is not None else inputs, run)
    x, _ = bert.encoder(x, inputs, run)
    return x


def _as_single_tokens(inputs: PackedBatch) -> PackedBatch:
    """Each token as a sequence of its own, which is all the same to its embedding: with copies of
    tokens behind it a sequence may be longer than there are positions, though no position is."""
    assert inputs.input_ids is not None
    return PackedBatch.from_flat(
        inputs.input_ids,
        [1] * inputs.num_tokens,
        token_type_ids=inputs.token_type_ids,
        position_ids=inputs.position_ids,
    )


@dataclass
class PretrainingPass(Pass):
    """A Pass that also carries

    rows: (R,) the tokens that the last layer, number ``last``, goes on with after its attention.
    bias: (1, T, max_seqlen), added to the scores of attention in every layer.
    """

    rows: Tensor | None = None
    bias: Tensor | None = None
    last: int = -1


class PretrainingLayer(BertLayer):
    """A BertLayer that heeds what a PretrainingPass carries; it takes over the parts of another.

    Keys and values come from all tokens; what comes behind attention looks at one row at a time, so
    the last layer computes it for the rows that are asked for alone: in BERT-base a quarter of a
    layer's products is left where few are.
    """

    def __init__(self, layer: BertLayer) -> None:
        super(BertLayer, self).__init__()
        self.attention = layer.attention
        self.intermediate = layer.intermediate
        self.output = layer.output
        self.head_dim = layer.head_dim
        self.activation = layer.activation

    def forward(self, x: Tensor, batch: PackedBatch, run: Pass, index: int) -> Tensor:
        if not isinstance(run, PretrainingPass):
            return super().forward(x, batch, run, index)
        rows = run.rows if index == run.last else None
        if rows is None and run.bias is None:
            return super().forward(x, batch, run, index)
        parts, site = self._parts(), 1 + 3 * index
        qkv = project_qkv(parts, x).view(x.shape[0], 3, -1, parts.head_dim)
        p = dropout_p(parts.attention_dropout, self.training)
        context = attention(
            qkv,
            batch.cu_seqlens,
            batch.max_seqlen,
            dropout_p=p,
            dropout_seed=run.dropout_seed if p > 0.0 else None,
            dropout_offset=site,
            bias=run.bias,
        )[0].flatten(1)
        if rows is not None:
            x, context = gather_rows(x, rows), gather_rows(context, rows)
        a, a_bias = project(parts.attention_output, context)
        p = dropout_p(parts.attention_output_dropout, self.training)
        h = add_norm(parts.attention_norm, a, x, a_bias, run, p, site + 1)
        y, y_bias = feed_forward(parts, h)
        p = dropout_p(parts.output_dropout, self.training)
        return add_norm(parts.output_norm, y, h, y_bias, run, p, site + 2)

    def _parts(self) -> LayerParts:
        attention = self.attention
        return LayerParts(
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


def prepare_encoder(bert: BertModel) -> None:
    """Put PretrainingLayers in the place of the layers of ``bert``: their parameters stay, and
    their names."""
    layers: Any = bert.encoder.layer
    bert.encoder.layer = nn.ModuleList(PretrainingLayer(layer) for layer in layers)
