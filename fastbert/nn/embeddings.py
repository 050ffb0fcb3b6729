"""The first layer of a BERT: word, position and segment embeddings, LayerNorm, dropout."""

from __future__ import annotations

import torch
from torch import nn

from fastbert.config import BertConfig
from fastbert.nn.layer import EmbeddingParts, Pass, embed
from fastbert.packed import PackedBatch


class BertEmbeddings(nn.Module):
    """dropout(LN(word + position + segment)) (Devlin et al., arXiv 1810.04805, figure 2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = _table(config.vocab_size, hidden, config.pad_token_id)
        self.position_embeddings = _table(config.max_position_embeddings, hidden)
        self.token_type_embeddings = _table(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch, run: Pass) -> torch.Tensor:
        """Returns (T, H).

        Raises ValueError for sequences longer than the position table and, on CPU, for ids outside
        their tables; on a GPU ids are never used out of bounds, but not reported.
        """
        positions = self.position_embeddings.num_embeddings
        width = batch.padded_shape[1]
        if width > positions:
            raise ValueError(
                f"input_ids: got sequences (or padded rows) of {width} tokens, expected at most "
                f"{positions} (max_position_embeddings)"
            )
        _check_ids("input_ids", batch.input_ids, self.word_embeddings)
        _check_ids("token_type_ids", batch.token_type_ids, self.token_type_embeddings)
        _check_ids("position_ids", batch.position_ids, self.position_embeddings)
        parts = EmbeddingParts(
            word=self.word_embeddings,
            position=self.position_embeddings,
            token_type=self.token_type_embeddings,
            norm=self.LayerNorm,
            dropout=self.dropout,
        )
        return embed(parts, batch, run, self.training)


def _table(rows: int, hidden: int, padding_idx: int | None = None) -> nn.Embedding:
    """An embedding that its model has yet to fill.

    nn.Embedding() itself draws normal numbers: twice the work, and on the meta device, where models
    to be loaded are built, torch imports 900 modules (seconds, 80 MB) in order to draw none.
    """
    return nn.Embedding.from_pretrained(
        torch.empty(rows, hidden), freeze=False, padding_idx=padding_idx
    )


def _check_ids(name: str, ids: torch.Tensor | None, table: nn.Embedding) -> None:
    """The ids are rows of the table; looked at on CPU only, where looking waits for nothing."""
    if ids is None or ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= table.num_embeddings:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: got {wrong}, expected 0 .. {table.num_embeddings - 1}")
