"""Losses of single classes that differ from cross entropy: smoothed labels, weighted classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods.base import Forward, Inputs, Method, check_number, loss_of
from fastbert.finetune.methods.predictions import CLASSES, Prediction, predictions
from fastbert.finetune.methods.structure import expect_classes
from fastbert.nn.heads import IGNORED

Tensor = torch.Tensor


@dataclass
class LabelSmoothing(Method):
    """loss = (1 - epsilon) L + epsilon mean_i 1/C sum_c -log p_i(c)

    (Szegedy et al., arXiv 1512.00567, section 7). The mean is over rows that count, C the number of
    classes; of a span, of the tokens of its text, start and end averaged. L is the loss inside, so
    that with class weights the smoothing itself is not weighted.
    """

    name = "label-smoothing"
    paper = "arXiv 1512.00567, section 7"
    summary = "a little of each label given to all classes alike"
    order = 31

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "epsilon", 0.0, 1.0)

    def prepare(self, model: nn.Module) -> None:
        expect_classes(self, model)

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        output = forward(inputs)
        found = predictions(self, output, inputs, model)
        for prediction in found:
            _expect_classes(self, prediction)
        uniform = torch.stack([p.mean(_surprise_of_uniform(p)) for p in found]).mean()
        output.loss = (1.0 - self.epsilon) * loss_of(self, output) + self.epsilon * uniform
        return output


def _expect_classes(method: Method, prediction: Prediction) -> None:
    if prediction.kind != CLASSES:
        raise ValueError(f"{method.name}: got labels of {prediction.kind}, expected single classes")


def _surprise_of_uniform(prediction: Prediction) -> Tensor:
    """(M,): the cross entropy between equal probabilities for all classes and the prediction."""
    surprise = -prediction.log_probabilities()
    if prediction.real is None:
        return surprise.mean(1)
    total = torch.where(prediction.real, surprise, 0.0).sum(1)
    return total / prediction.real.sum(1).clamp(min=1)


def balanced(counts: Sequence[int]) -> tuple[float, ...]:
    """w(c) = N / (C n_c) for n_c of N rows of each of C classes; 0 for a class without any."""
    rows = sum(counts)
    return tuple(rows / (len(counts) * n) if n else 0.0 for n in counts)


@dataclass
class ClassWeights(Method):
    """loss = sum_i w(y_i) (-log p_i(y_i)) / sum_i w(y_i)

    weights: one for each class; or "balanced", N / (C n_c) for n_c of N training examples (King and
        Zeng, "Logistic regression in rare events data", 2001), told by ``count_classes``.
    """

    name = "class-weights"
    paper = "King and Zeng 2001"
    summary = "errors on rare classes count more"
    order = 30

    weights: str | tuple[float, ...] = "balanced"

    def __post_init__(self) -> None:
        self._counted: tuple[float, ...] | None = None
        if isinstance(self.weights, str):
            if self.weights != "balanced":
                raise ValueError(
                    f"{self.name}: weights: got {self.weights!r}, expected 'balanced' or numbers"
                )
            return
        numbers = self.weights if isinstance(self.weights, Sequence) else ()
        are_weights = all(isinstance(w, int | float) and 0.0 <= w < math.inf for w in numbers)
        if not are_weights or not any(numbers):
            raise ValueError(f"{self.name}: weights: got {self.weights}, expected numbers >= 0")
        self.weights = tuple(map(float, numbers))

    def count_classes(self, counts: Sequence[int]) -> None:
        self._counted = balanced(counts)

    def prepare(self, model: nn.Module) -> None:
        expect_classes(self, model, ("SequenceClassification", "TokenClassification"))
        config: Any = model.config
        given = self._chosen()
        if len(given) != config.num_labels:
            raise ValueError(
                f"{self.name}: weights: got {len(given)}, expected one for each of "
                f"{config.num_labels} classes"
            )

    def _chosen(self) -> tuple[float, ...]:
        chosen = self._counted if isinstance(self.weights, str) else self.weights
        if chosen is None:
            raise ValueError(f"{self.name}: balanced, but nobody has said how frequent classes are")
        return chosen

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        output = forward(inputs)
        (prediction,) = predictions(self, output, inputs, model)
        _expect_classes(self, prediction)
        weights = prediction.logits.new_tensor(self._chosen())
        output.loss = F.cross_entropy(
            prediction.logits, prediction.labels, weights, ignore_index=IGNORED
        )
        return output
