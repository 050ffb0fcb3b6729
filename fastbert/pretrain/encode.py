"""The encoder as pretraining runs it: with attention masks, and for the rows that heads ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastbert.config import BertConfig
from fastbert.models import BertModel
from fastbert.nn.layer import new_pass
from fastbert.ops import choices
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


def slow_mask(config: BertConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention with a mask between tokens is computed by the reference; None where a kernel
    does it."""
    size = config.hidden_size // config.num_attention_heads
    rows = choices(device.type, dtype, {"attention": size}, bias=True)
    row = next(row for row in rows if row["op"] == "attention")
    return "; ".join(row["passed_over"].values()) if row["backend"] == "reference" else None


def encode(bert: BertModel, batch: PretrainingBatch) -> Tensor:
    """The last hidden state, (R, H), of the rows that the batch asks for, or of all T tokens.

    Without visibility this is ``bert.encode``. With rows the last layer leaves out what comes
    behind attention for the others, in BERT-base three quarters of its products where few are
    asked for: the same numbers, but that dropout falls otherwise.
    """
    inputs = batch.inputs
    bias = None
    if batch.visibility is not None:
        bias = attention_bias(batch.visibility, inputs)
    run = replace(new_pass(bert, inputs.cu_seqlens.device), bias=bias, rows=batch.rows)
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
