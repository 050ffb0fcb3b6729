"""Objective: one thing to predict, from the example to the loss; and the pieces they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.config import BertConfig
from fastbert.models import BertModel
from fastbert.nn.heads import wide
from fastbert.ops import gather_rows, linear_cross_entropy
from fastbert.packed import PackedBatch
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.examples import Example, Vocabulary
from fastbert.train.flops import matrix_weights

Tensor = torch.Tensor
Targets = Mapping[str, Tensor]

# When an objective's turn comes to prepare an example: first those that move text about, then the
# one that masks or replaces tokens, then those that work on or ask about what is there.
ARRANGE, CORRUPT, ASK = range(3)

_CHUNK = 2**25  # logits that are looked at together


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of the loss.

    total: 0-d, the losses of all its targets, added up.  weight: its factor in the whole loss.
    correct: 0-d, how many targets the best guess gets right.  chance: 0-d, how many are right by
    always answering with the most frequent answer of the batch. Both are None unless measured.
    """

    total: Tensor
    weight: float = 1.0
    correct: Tensor | None = None
    chance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """What heads compute from.

    states: (R, H), the encoder's output where the batch has rows.
    inputs: what it encoded.  bert: the encoder.
    measure: whether terms are to have ``correct`` and ``chance``.
    """

    states: Tensor
    inputs: PackedBatch
    bert: BertModel
    measure: bool

    @property
    def word_embeddings(self) -> Tensor:
        """(V, H): what decoders are tied to."""
        return self.bert.embeddings.word_embeddings.weight

    def at(self, index: Tensor) -> Tensor:
        """(M, H): the states at ``index`` (M,), which ascends."""
        return gather_rows(self.states, index)

    def pooled(self, index: Tensor) -> Tensor:
        """tanh(W x + b) of the states at ``index``, the [CLS]s: BERT's pooler."""
        assert self.bert.pooler is not None
        return torch.tanh(self.bert.pooler.dense(self.at(index)))


class Objective(ABC):
    """One thing to predict. Subclasses are frozen dataclasses: their fields are their options.

    name: as ``mlm+nsp`` has it, and of its targets.  paper: where it is from.  summary: one line.
    stage: ARRANGE, CORRUPT or ASK. Of those that corrupt there is at most one.
    columns: the optional columns of Example that it reads.  counts_tokens: whether it needs the
        counts of ``Vocabulary``.
    relations: between two segments, which the source has to provide; see ``SegmentPairs``.
    needs: names of other objectives, one of which it goes with.
    alone: whether it goes with no other.
    masks_attention: whether its examples have ``visibility``, a mask between tokens.
    head_name: objectives with the same one share a head; the objective's name unless given.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[int] = ASK
    relations: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False
    masks_attention: ClassVar[bool] = False
    head_name: ClassVar[str] = ""

    @property
    def columns(self) -> frozenset[str]:
        return frozenset()

    @property
    def counts_tokens(self) -> bool:
        return False

    @abstractmethod
    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        """The example with the inputs changed, and ``example.asking(self.name, …)``."""

    @abstractmethod
    def head(self, config: BertConfig) -> nn.Module:
        """What stands on the encoder; its parameters are initialised by the model."""

    def counts(self, targets: Targets) -> dict[str, int]:
        """How many targets each of the terms has, known without waiting for the device."""
        return {"": len(targets["labels"])}

    def flops(self, head: Any, config: BertConfig, batch: PretrainingBatch) -> int:
        """Of the head's products in the forward pass: 2 a target and weight of its matrices, unless
        a subclass knows better. See ``fastbert.train.flops``."""
        return 2 * matrix_weights(head) * sum(self.counts(batch.targets[self.name]).values())

    def rewrite(
        self, head: Any, bert: BertModel, batch: PretrainingBatch, measure: bool
    ) -> tuple[PretrainingBatch, dict[str, Term]]:
        """Called before the encoder: the batch that it is to see, and terms known already."""
        return batch, {}

    @abstractmethod
    def terms(self, head: Any, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        """The summands of the loss; "" is the name of an objective's only or main one."""


def token_term(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, measure: bool
) -> Term:
    """Cross entropy of softmax(hidden weight^T + bias) over the vocabulary, without (M, V) logits.

    hidden: (M, H).  weight: (V, H).  bias: (V,).  labels: (M,) int64.
    """
    total = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum")
    if not measure:
        return Term(total)
    correct = torch.zeros((), device=hidden.device)
    with torch.no_grad():
        for rows in torch.arange(len(labels), device=labels.device).split(
            max(1, _CHUNK // len(weight))
        ):
            logits = F.linear(hidden[rows], weight.to(hidden.dtype))
            best = (logits if bias is None else logits + bias).argmax(1)
            correct += (best == labels[rows]).sum()
    return Term(total, correct=correct, chance=_most_frequent(labels))


def class_term(logits: Tensor, labels: Tensor, measure: bool) -> Term:
    """Cross entropy of logits (M, C) and labels (M,) int64."""
    logits = wide(logits)
    total = F.cross_entropy(logits, labels, reduction="sum")
    if not measure:
        return Term(total)
    correct = (logits.argmax(1) == labels).sum().float()
    return Term(total, correct=correct, chance=_most_frequent(labels))


def binary_term(logits: Tensor, labels: Tensor, measure: bool, weight: float = 1.0) -> Term:
    """Cross entropy of sigmoid(logits) (M,) and labels (M,) bool."""
    logits = wide(logits)
    total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    if not measure:
        return Term(total, weight)
    correct = ((logits > 0) == labels).sum().float()
    return Term(total, weight, correct, _most_frequent(labels.long()))


def _most_frequent(labels: Tensor) -> Tensor:
    """How often the most frequent label occurs."""
    counts = torch.bincount(labels)
    return counts.max().float() if len(labels) else counts.new_zeros((), dtype=torch.float32)
