"""What a model predicts, as distributions that can be compared, whatever its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods.base import Inputs, Method, loss_of
from fastbert.nn.heads import IGNORED, wide
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

# What the columns of the logits are: classes that exclude each other, several independent yes or
# no, or numbers.
CLASSES, SEVERAL, NUMBERS = "classes", "several classes at once", "numbers"


@dataclass(frozen=True, eq=False)
class Prediction:
    """M answers.

    kind: CLASSES, SEVERAL or NUMBERS.
    logits: (M, C), in fp32 at least.
    labels: (M,) int64, IGNORED where a row does not count; with SEVERAL and NUMBERS (M, C) floats.
    real: None, or (M, C) bool: which classes a row has. The tokens of a text, for a span.
    """

    kind: str
    logits: Tensor
    labels: Tensor
    real: Tensor | None = None

    def log_probabilities(self) -> Tensor:
        """(M, C) log softmax over the classes that a row has; of no meaning at others."""
        if self.real is None:
            return self.logits.log_softmax(1)
        lowest = torch.finfo(self.logits.dtype).min
        return self.logits.masked_fill(~self.real, lowest).log_softmax(1)

    def mean(self, rows: Tensor) -> Tensor:
        """The mean of ``rows`` (M,) over those that count; 0 where none does."""
        if self.kind != CLASSES:
            return rows.mean()
        counts = self.labels != IGNORED
        return torch.where(counts, rows, 0.0).sum() / counts.sum().clamp(min=1)

    def detach(self) -> Prediction:
        return Prediction(self.kind, self.logits.detach(), self.labels, self.real)


def predictions(
    method: Method, output: Any, inputs: Inputs, model: nn.Module
) -> tuple[Prediction, ...]:
    """The answers of ``output``: for spans those of their start and their end, else one.

    Raises ValueError for inputs without labels and outputs without a loss or logits.
    """
    loss_of(method, output)
    if getattr(output, "start_logits", None) is not None:
        return _spans(method, output, inputs)
    logits, labels = getattr(output, "logits", None), inputs.get("labels")
    if logits is None or labels is None:
        missing = "logits" if logits is None else "labels"
        raise ValueError(f"{method.name}: got no {missing} for a {type(model).__name__}")
    kind = _kind(getattr(model.config, "problem_type", None), logits, labels)
    logits = wide(logits)
    if kind == CLASSES:
        rows = logits.reshape(-1, logits.shape[-1])
        return (Prediction(kind, rows, labels.reshape(-1).long()),)
    return (Prediction(kind, logits, labels.reshape(logits.shape).to(logits.dtype)),)


def divergence(a: Sequence[Prediction], b: Sequence[Prediction]) -> Tensor:
    """How far two predictions for the same rows are apart, 0-d and 0 where they are the same: the
    mean over rows that count of

    - KL(a || b) + KL(b || a) of single classes and of spans (start and end averaged),
    - the same of each yes or no, averaged, of several classes at once,
    - (a - b)^2 of numbers

    (Jiang et al., arXiv 1911.03437, section 2.1).
    """
    terms = [p.mean(_distances(p, q)) for p, q in zip(a, b, strict=True)]
    return torch.stack(terms).mean()


def _distances(p: Prediction, q: Prediction) -> Tensor:
    """(M,)."""
    if p.kind == NUMBERS:
        return (p.logits - q.logits).square().mean(1)
    if p.kind == SEVERAL:
        # KL(p || q) + KL(q || p) = (p - q) (logit p - logit q) for yes or no.
        difference = p.logits - q.logits
        return ((p.logits.sigmoid() - q.logits.sigmoid()) * difference).mean(1)
    # KL(p || q) + KL(q || p) = sum (p - q) (log p - log q).
    # A class that a row lacks adds 0: both probabilities are 0, both logarithms finite.
    log_p, log_q = p.log_probabilities(), q.log_probabilities()
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


def _kind(problem: str | None, logits: Tensor, labels: Tensor) -> str:
    """As the loss of the model decides it."""
    if problem == "regression" or (problem is None and logits.shape[-1] == 1):
        return NUMBERS
    if problem == "multi_label_classification" or (problem is None and labels.is_floating_point()):
        return SEVERAL
    return CLASSES


def _spans(method: Method, output: Any, inputs: Inputs) -> tuple[Prediction, ...]:
    batch: PackedBatch | None = inputs.get("batch")
    found = []
    for end in ("start", "end"):
        logits, positions = getattr(output, f"{end}_logits"), inputs.get(f"{end}_positions")
        if positions is None:
            raise ValueError(f"{method.name}: got no {end}_positions, expected both positions")
        if batch is not None:
            real = batch.unpack(torch.ones_like(logits)) != 0
            logits = batch.unpack(logits)
        else:
            mask = inputs.get("attention_mask")
            real = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask != 0
        columns = positions.reshape(-1, 1).long().clamp(0, real.shape[1])
        counts = F.pad(real, (0, 1)).gather(1, columns)
        labels = torch.where(counts, columns, IGNORED)[:, 0]
        found.append(Prediction(CLASSES, wide(logits), labels, real))
    return tuple(found)
