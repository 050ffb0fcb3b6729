"""Objectives on the whole sequence, in place of or beside next-sentence prediction."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
from torch import nn

from fastbert.config import BertConfig
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.objectives.objective import (
    ARRANGE,
    Encoded,
    Objective,
    Targets,
    Term,
    class_term,
)

Array = np.ndarray


class SequenceClass(Objective):
    """Softmax over ``classes`` of W tanh(W_p x + b_p) + b, x the state of [CLS]."""

    @property
    @abstractmethod
    def classes(self) -> int: ...

    def asks(self, example: Example, label: int) -> Example:
        """With this label, or none for NONE."""
        count = int(label != NONE)
        return example.asking(
            self.name, index=np.zeros(count, np.int64), labels=np.full(count, label)
        )

    def head(self, config: BertConfig) -> nn.Linear:
        return nn.Linear(config.hidden_size, self.classes)

    def flops(self, head: nn.Linear, config: BertConfig, batch: PretrainingBatch) -> int:
        pooler = 2 * config.hidden_size**2 * len(batch.targets[self.name]["labels"])
        return pooler + super().flops(head, config, batch)

    def terms(self, head: nn.Linear, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        logits = head(encoded.pooled(targets["index"]))
        return {"": class_term(logits, targets["labels"], encoded.measure)}


class SegmentRelation(SequenceClass):
    """Which of the relations the second segment bears to the first; ``SegmentPairs`` draws it, and
    its place in ``relations`` is the label. An example of one segment has none."""

    @property
    def classes(self) -> int:
        return len(self.relations)

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        return self.asks(example, example.relation)


@dataclass(frozen=True)
class NextSentence(SegmentRelation):
    """Devlin et al., arXiv 1810.04805, section 3.1, task 2; 0: next, as in Google's code."""

    name = "nsp"
    paper = "BERT, arXiv 1810.04805"
    summary = "does B follow A, or is it from another document"
    relations = ("next", "other")


@dataclass(frozen=True)
class SentenceOrder(SegmentRelation):
    """Lan et al., arXiv 1909.11942, section 3.1; 0: in order, 1: swapped."""

    name = "sop"
    paper = "ALBERT, arXiv 1909.11942"
    summary = "are two segments in a row in their order, or swapped"
    relations = ("next", "previous")


@dataclass(frozen=True)
class ThreeWay(SegmentRelation):
    """Wang et al., arXiv 1908.04577, section 3.3: a third each."""

    name = "3way"
    paper = "StructBERT, arXiv 1908.04577"
    summary = "does B follow A, come before it, or neither"
    relations = ("next", "previous", "other")


@dataclass(frozen=True)
class SentenceDistance(SegmentRelation):
    """Sun et al., arXiv 1907.12412, section 4.2.2."""

    name = "distance"
    paper = "ERNIE 2.0, arXiv 1907.12412"
    summary = "are two segments adjacent, of one document, or of two"
    relations = ("next", "same", "other")


@dataclass(frozen=True)
class Reordering(SequenceClass):
    """The sentences of the first segment are parted into 1 .. ``most`` parts at random and these
    permuted; the class is the number of the permutation among all of them, those of fewer parts
    first: sum_m m! classes, 9 for 3 parts (Sun et al., arXiv 1907.12412, section 4.2.2)."""

    name = "reorder"
    paper = "ERNIE 2.0, arXiv 1907.12412"
    summary = "how parts of the text were permuted"
    stage = ARRANGE

    most: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.most <= 5:
            raise ValueError(f"most: got {self.most!r}, expected 2 .. 5")

    @property
    def classes(self) -> int:
        return sum(factorial(parts) for parts in range(1, self.most + 1))

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        # The places keep whatever special tokens stand between them.
        places = np.flatnonzero(example.ordinary & (example.token_type_ids == 0))
        sentence = example.sentence[places]
        begins = np.flatnonzero(np.diff(sentence, prepend=NONE))
        parts = int(rng.integers(1, min(self.most, max(1, len(begins))) + 1))
        cuts = np.sort(rng.permutation(begins[1:])[: parts - 1])
        orders = list(permutations(range(parts)))
        drawn = int(rng.integers(len(orders)))
        pieces = np.split(places, cuts)
        rows = np.arange(len(example))
        rows[places] = np.concatenate([pieces[part] for part in orders[drawn]])
        before = sum(factorial(fewer) for fewer in range(1, parts))
        return self.asks(example.take(rows), before + drawn)
