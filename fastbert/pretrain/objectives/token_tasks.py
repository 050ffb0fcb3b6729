"""ERNIE 2.0's word-aware tasks on every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from fastbert.config import BertConfig
from fastbert.pretrain.examples import Example, Vocabulary
from fastbert.pretrain.objectives.objective import Encoded, Objective, Targets, Term, binary_term


class TokenFact(Objective):
    """sigmoid(w . x + b) at every ordinary token, for a fact that is a column of the example."""

    fact: ClassVar[str]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({self.fact})

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        index = np.flatnonzero(example.ordinary)
        return example.asking(self.name, index=index, labels=getattr(example, self.fact)[index])

    def head(self, config: BertConfig) -> nn.Linear:
        return nn.Linear(config.hidden_size, 1)

    def terms(self, head: nn.Linear, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        logits = head(encoded.at(targets["index"]))[:, 0]
        return {"": binary_term(logits, targets["labels"], encoded.measure)}


@dataclass(frozen=True)
class Capitalised(TokenFact):
    """Whether the token's word began with a capital letter, which an uncased tokenizer does not
    tell (Sun et al., arXiv 1907.12412, section 4.2.1)."""

    name = "capitalised"
    paper = "ERNIE 2.0, arXiv 1907.12412"
    summary = "was the word capitalised"
    fact = "capitalised"


@dataclass(frozen=True)
class Elsewhere(TokenFact):
    """Whether the token occurs in other segments of its document (Sun et al., arXiv 1907.12412,
    section 4.2.1, token-document relation)."""

    name = "elsewhere"
    paper = "ERNIE 2.0, arXiv 1907.12412"
    summary = "does the token occur elsewhere in its document"
    fact = "elsewhere"
