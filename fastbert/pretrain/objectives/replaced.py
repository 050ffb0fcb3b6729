"""ELECTRA: a small generator fills masks in, the encoder tells which tokens it replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.models import BertModel
from fastbert.nn import BertEncoder
from fastbert.nn.encoder import activation
from fastbert.nn.heads import wide
from fastbert.nn.layer import EmbeddingParts, embed, new_pass
from fastbert.packed import PackedBatch
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.objectives.masked import Masks
from fastbert.pretrain.objectives.objective import Encoded, Targets, Term, binary_term, token_term
from fastbert.train.flops import encoder_flops, matrix_weights

Tensor = torch.Tensor

_HEAD_DIM = 64
_BASE = 768  # the width of BERT-base
_CHUNK = 2**25  # logits that are sampled from together


def generator_config(config: BertConfig, divisor: int | None = None) -> BertConfig:
    """A generator of about 1 / divisor of the encoder's width and as many layers: heads of 64
    channels, or one of fewer where the width is less, and an FFN of four times the width.

    divisor: None is 3 for the width of BERT-base and 4 for every other (Clark et al., arXiv
        2003.10555, table 6).
    """
    if divisor is None:
        divisor = 3 if config.hidden_size == _BASE else 4
    wanted = config.hidden_size / divisor
    heads = max(1, round(wanted / _HEAD_DIM))
    width = heads * min(_HEAD_DIM, max(8, int(wanted) // 8 * 8))
    return config.replace(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)


class Generator(nn.Module):
    """A small masked LM on the encoder's own embedding tables (Clark et al., arXiv 2003.10555,
    section 3.2): LN(word + position + type) → Linear(H, H_g) → layers of H_g → LN(act(Linear(H_g,
    H))) → the word embeddings as decoder, and a bias of its own."""

    def __init__(self, config: BertConfig, divisor: int | None) -> None:
        super().__init__()
        small = generator_config(config, divisor)
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.projection = nn.Linear(hidden, small.hidden_size)
        self.encoder = BertEncoder(small)
        self.transform = nn.Linear(small.hidden_size, hidden)
        self.transform_norm = nn.LayerNorm(hidden, eps=eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._activation = activation(config)

    def forward(self, bert: BertModel, inputs: PackedBatch, place: Tensor) -> Tensor:
        """(M, H): what the decoder takes at the masked places."""
        tables = bert.embeddings
        parts = EmbeddingParts(
            word=tables.word_embeddings,
            position=tables.position_embeddings,
            token_type=tables.token_type_embeddings,
            norm=self.norm,
            dropout=self.dropout,
            projection=self.projection,
        )
        run = replace(new_pass(self, inputs.cu_seqlens.device), rows=place)
        x = embed(parts, inputs, run, self.training)
        x, _ = self.encoder(x, inputs, run)
        return self.transform_norm(_activated(self.transform(x), self._activation))


class _Heads(nn.Module):
    """The generator, and on the encoder W_2 act(W_1 x + b_1) + b_2, one logit a token."""

    def __init__(self, config: BertConfig, divisor: int | None) -> None:
        super().__init__()
        self.generator = Generator(config, divisor)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, 1)
        self._activation = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """(R, H) -> logits (R,)."""
        return self.out(_activated(self.dense(x), self._activation))[:, 0]


def _activated(x: Tensor, function: str | Callable[[Tensor], Tensor]) -> Tensor:
    """``function``: of ``fastbert.nn.encoder.activation``."""
    return F.gelu(x, approximate=function) if isinstance(function, str) else function(x)


def _electra_masking() -> Masking:
    return Masking(replace=(0.85, 0.0, 0.15))


@dataclass(frozen=True)
class ReplacedTokens(Masks):
    """L = L_MLM of the generator + ``weight`` · cross entropy of "this token was replaced", over
    all tokens (Clark et al., arXiv 2003.10555, eq. 1 and section 3.1).

    Masked places get a token sampled from the generator's softmax at temperature 1, without a
    gradient through it; one that is the original by chance counts as original. The embedding
    tables are shared, position and token types too. 15% of the masked tokens are left as they are
    for the generator (the authors' code).
    divisor: of the encoder's width; None is that of the encoder's size, see ``generator_config``.
    """

    name = "rtd"
    paper = "ELECTRA, arXiv 2003.10555"
    summary = "which tokens a small generator replaced"

    masking: Masking = field(default_factory=_electra_masking)
    divisor: int | None = None
    weight: float = 50.0

    def __post_init__(self) -> None:
        if self.divisor is not None and self.divisor < 1:
            raise ValueError(f"divisor: got {self.divisor!r}, expected 1 or more")

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        group = self.masking.choose(example, vocabulary, rng)
        masked = np.flatnonzero(group != NONE)
        ids = self.masking.corrupt(example.ids, group, vocabulary, rng)
        return example.replace(ids=ids, group=group).asking(
            self.name,
            place=masked,
            labels=example.ids[masked],
            index=np.arange(len(example)),
        )

    def head(self, config: BertConfig) -> _Heads:
        return _Heads(config, self.divisor)

    def counts(self, targets: Targets) -> dict[str, int]:
        return {"generator": len(targets["labels"]), "": len(targets["index"])}

    def flops(self, head: _Heads, config: BertConfig, batch: PretrainingBatch) -> int:
        """The generator's too: its layers, the projection of every token before them, and behind
        them, of masked ones, the transform and the product with the word embeddings."""
        masked = len(batch.targets[self.name]["labels"])
        small, tokens = generator_config(config, self.divisor), batch.inputs.num_tokens
        width = config.hidden_size * small.hidden_size
        products = (tokens + masked) * width + masked * config.vocab_size * config.hidden_size
        asked = len(batch.targets[self.name]["index"])
        told = asked * (matrix_weights(head.dense) + matrix_weights(head.out))
        return encoder_flops(small, batch.inputs.lengths, masked) + 2 * (products + told)

    def rewrite(
        self, head: _Heads, bert: BertModel, batch: PretrainingBatch, measure: bool
    ) -> tuple[PretrainingBatch, dict[str, Term]]:
        """The masked tokens filled in by the generator, and its own loss."""
        targets = batch.targets[self.name]
        place, labels = targets["place"], targets["labels"]
        generator, words = head.generator, bert.embeddings.word_embeddings.weight
        hidden = generator(bert, batch.inputs, place)
        term = token_term(hidden, words, generator.bias, labels, measure)
        sampled = sample_tokens(hidden, words, generator.bias)
        assert batch.inputs.input_ids is not None
        ids = batch.inputs.input_ids.index_copy(0, place, sampled)
        replaced = torch.zeros_like(ids, dtype=torch.bool).index_copy(0, place, sampled != labels)
        batch = batch.replace(
            inputs=batch.inputs.replace(input_ids=ids),
            targets={
                **batch.targets,
                self.name: {**targets, "replaced": replaced[batch.places(targets["index"])]},
            },
        )
        return batch, {"generator": term}

    def terms(self, head: _Heads, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        logits = head(encoded.at(targets["index"]))
        return {"": binary_term(logits, targets["replaced"], encoded.measure, self.weight)}


@torch.no_grad()
def sample_tokens(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(M,) int64: a token from each softmax(hidden weight^T + bias), by torch's generator.

    argmax of the logits plus Gumbel noise, -log of an exponential variable, is such a draw.
    """
    found = []
    for rows in hidden.split(max(1, _CHUNK // len(weight))):
        logits = wide(F.linear(rows, weight.to(rows.dtype)) + bias)
        noise = torch.empty_like(logits).exponential_().log_().neg_()
        found.append((logits + noise).argmax(1))
    return torch.cat(found)
