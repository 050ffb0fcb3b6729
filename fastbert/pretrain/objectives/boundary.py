"""The span boundary objective of SpanBERT, and the decoder of what one state stands for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.objectives.objective import Encoded, Objective, Targets, Term, token_term
from fastbert.train.flops import matrix_weights

Tensor = torch.Tensor

OFFSET_SIZE = 200  # p_i (Joshi et al., arXiv 1907.10529, section 3.2)


class OffsetDecoder(nn.Module):
    """h = LN(GELU(W_1 [x; …; p_i])), y = LN(GELU(W_2 h)), logits = E y + b, with E the word
    embeddings (Joshi et al., arXiv 1907.10529, section 3.2).

    inputs: how many states x come together.  offsets: the largest i, plus 1.
    """

    def __init__(self, config: BertConfig, inputs: int, offsets: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.offsets = nn.Embedding(offsets, OFFSET_SIZE)
        self.first = nn.Linear(inputs * hidden + OFFSET_SIZE, hidden)
        self.first_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.second = nn.Linear(hidden, hidden)
        self.second_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def flops(self, config: BertConfig) -> int:
        """Of one target, the product with the word embeddings among it."""
        return 2 * (matrix_weights(self) + config.vocab_size * config.hidden_size)

    def term(
        self, states: tuple[Tensor, ...], offset: Tensor, labels: Tensor, encoded: Encoded
    ) -> Term:
        """states: each (M, H).  offset, labels: (M,) int64."""
        x = torch.cat((*states, self.offsets(offset).to(states[0].dtype)), 1)
        h = self.first_norm(F.gelu(self.first(x)))
        y = self.second_norm(F.gelu(self.second(h)))
        return token_term(y, encoded.word_embeddings, self.bias, labels, encoded.measure)


@dataclass(frozen=True)
class SpanBoundary(Objective):
    """-sum log p(x_i | x_{s-1}, x_{e+1}, p_{i-s+1}) over the tokens i of each masked span s .. e:
    what is in a span, from the two states outside of it (Joshi et al., arXiv 1907.10529, eq. 1).

    A span is what is masked without a gap. Tokens behind its first ``longest`` have no target.
    """

    name = "sbo"
    paper = "SpanBERT, arXiv 1907.10529"
    summary = "masked spans from the two tokens beside them"
    needs = ("mlm",)

    longest: int = 20

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        masked, labels = (example.targets["mlm"][name] for name in ("index", "labels"))
        # Between special tokens at both ends, a span always has a token on either side.
        begins = np.diff(masked, prepend=NONE - 1) != 1
        span = np.cumsum(begins) - 1
        first = masked[begins]
        size = np.bincount(span, minlength=len(first))
        offset = masked - first[span]
        kept = offset < self.longest
        left, right = (first - 1)[span], (first + size)[span]
        return example.asking(
            self.name,
            left_index=left[kept],
            right_index=right[kept],
            offset=offset[kept],
            labels=labels[kept],
        )

    def head(self, config: BertConfig) -> OffsetDecoder:
        return OffsetDecoder(config, inputs=2, offsets=self.longest)

    def flops(self, head: OffsetDecoder, config: BertConfig, batch: PretrainingBatch) -> int:
        return len(batch.targets[self.name]["labels"]) * head.flops(config)

    def terms(self, head: OffsetDecoder, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        sides = (encoded.states[targets["left_index"]], encoded.states[targets["right_index"]])
        return {"": head.term(sides, targets["offset"], targets["labels"], encoded)}
