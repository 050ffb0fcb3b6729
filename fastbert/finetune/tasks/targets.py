"""What a text is given: one of several classes, a number, or a set of labels."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastbert.finetune import metrics
from fastbert.finetune.table import Table

Array = np.ndarray
Prediction = dict[str, Any]
Problem = tuple[str, str]
"""What is wrong with a row: the reason, in the same words for all such rows, and the details."""

_MISSING = ("", "nan")  # in lower case: how tables of texts write that there is nothing
_FEW = 20  # whole numbers that are taken for classes


class Outcomes(NamedTuple):
    """Classes of (N,) things: what is and what was predicted, with its probability.

    names: of the C classes.  gold, predicted: (N,) int64.  confidence: (N,).
    """

    names: tuple[str, ...]
    gold: Array
    predicted: Array
    confidence: Array


class Target(ABC):
    """One kind of label of a text.

    selects: the score that chooses the best checkpoint, the higher the better.
    """

    kind: ClassVar[str]
    selects: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Fields of the model's config."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What ``target_of`` makes it from again: JSON."""

    @abstractmethod
    def problem(self, value: Any) -> Problem | None:
        """What is wrong with a label."""

    @abstractmethod
    def array(self, values: Sequence[Any]) -> Array:
        """N labels without a problem, as a model takes them."""

    @abstractmethod
    def predictions(self, logits: Array) -> list[Prediction]:
        """A prediction for each row of logits (N, C)."""

    @abstractmethod
    def scores(
        self, predictions: Sequence[Prediction], values: Sequence[Any]
    ) -> dict[str, metrics.Score]:
        """How good N predictions are, by the labels."""

    def outcomes(self, predictions: Sequence[Prediction], values: Sequence[Any]) -> Outcomes | None:
        """For a confusion matrix and a plot of calibration, where there are classes."""
        return None


def is_missing(value: Any) -> bool:
    """Whether a label is None, NaN or an empty text."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- classes ----------------------------------------------------------------------------------


def class_name(value: Any) -> str | None:
    """The name of a class: 1 and 1.0 are "1", True is "true"; None for what is none."""
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int | float) else None


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted: as numbers if all of them are, else as texts."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


class Classes(Target):
    """One of C classes.

    names: of the classes, by number.
    """

    kind, selects = "classes", "accuracy"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.numbers = {name: i for i, name in enumerate(names)}

    @classmethod
    def discover(cls, table: Table, role: str) -> Classes:
        """Those that occur. Raises ValueError for fewer than two, and for so many that they are no
        classes: numbers with fractions, or another one in almost every row."""
        found = {name for name in map(class_name, table.columns[role]) if name is not None}
        if len(found) < 2:
            held = f"all rows have {next(iter(found))!r}" if found else "no row has one"
            raise ValueError(f"{table.name}: {role}: {held}, expected two classes or more")
        if len(found) > _FEW and (2 * len(found) > len(table) or _fractions(found)):
            raise ValueError(
                f"{table.name}: {role}: got {len(found)} different ones in {len(table)} rows, "
                f"such as {sorted(found)[0][:50]!r}, expected classes; is this the right column? "
                "(Numbers on a scale are for the task regress.)"
            )
        return cls(in_order(found))

    @classmethod
    def of_config(cls, config: Any) -> Classes:
        """Those of a checkpoint; where it has no names for them, their numbers."""
        names = [config.id2label[i] for i in range(config.num_labels)]
        default = all(name == f"LABEL_{i}" for i, name in enumerate(names))
        return cls([str(i) for i in range(len(names))] if default else names)

    def config(self) -> dict[str, Any]:
        return {**label_config(self.names), "problem_type": "single_label_classification"}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names)}

    def problem(self, value: Any) -> Problem | None:
        name = class_name(value)
        if name is None:
            return "no label", f"got {value!r}"
        if name not in self.numbers:
            return "unknown label", f"got {name!r}, expected {listed(self.names)}"
        return None

    def array(self, values: Sequence[Any]) -> Array:
        return np.array([self.numbers[str(class_name(value))] for value in values], np.int64)

    def predictions(self, logits: Array) -> list[Prediction]:
        probabilities = softmax(logits)
        return [
            {"label": self.names[best], "probabilities": dict(zip(self.names, row, strict=True))}
            for best, row in zip(logits.argmax(1), probabilities.tolist(), strict=True)
        ]

    def scores(
        self, predictions: Sequence[Prediction], values: Sequence[Any]
    ) -> dict[str, metrics.Score]:
        names, gold, predicted, confidence = self.outcomes(predictions, values)
        measures = [
            metrics.classification(gold, predicted, len(names)),
            metrics.calibration(confidence, gold == predicted),
        ]
        if len(names) == 2:
            positive = np.where(predicted == 1, confidence, 1 - confidence)
            measures.append(metrics.roc_auc(gold, positive))
        return metrics.scored(measures, len(gold))

    def outcomes(self, predictions: Sequence[Prediction], values: Sequence[Any]) -> Outcomes:
        labels = [prediction["label"] for prediction in predictions]
        confidence = [p["probabilities"][p["label"]] for p in predictions]
        return Outcomes(self.names, self.array(values), self.array(labels), np.array(confidence))


def _fractions(names: Iterable[str]) -> bool:
    try:
        return not all(float(name).is_integer() for name in names)
    except ValueError:
        return False


def are_classes(values: Iterable[Any]) -> bool:
    """Whether labels are names, or a few whole numbers, rather than numbers on a scale."""
    found = {name for name in map(class_name, values) if name is not None}
    try:
        numbers = [float(name) for name in found]
    except ValueError:
        return True
    return len(numbers) <= _FEW and all(number.is_integer() for number in numbers)


def label_config(names: Sequence[str]) -> dict[str, Any]:
    """The fields of a config that name its labels."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def listed(names: Sequence[str]) -> str:
    """The names, or the first few of many."""
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)} in all)"


def softmax(x: Array) -> Array:
    """Over the last dimension, in float64."""
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# --- numbers ----------------------------------------------------------------------------------


class Number(Target):
    """A number."""

    kind, selects = "number", "pearson"

    @classmethod
    def discover(cls, table: Table, role: str) -> Number:
        """Raises ValueError where there are not two different ones."""
        found = {number for number in map(_number, table.columns[role]) if number is not None}
        if len(found) < 2:
            held = f"all rows have {next(iter(found)):g}" if found else "no row has a number"
            raise ValueError(f"{table.name}: {role}: {held}, expected two numbers or more")
        return cls()

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def problem(self, value: Any) -> Problem | None:
        if is_missing(value):
            return "no label", f"got {value!r}"
        if _number(value) is None:
            return "label is not a number", f"got {value!r}"
        return None

    def array(self, values: Sequence[Any]) -> Array:
        return np.array([_number(value) for value in values], np.float32)

    def predictions(self, logits: Array) -> list[Prediction]:
        return [{"value": value} for value in logits[:, 0].tolist()]

    def scores(
        self, predictions: Sequence[Prediction], values: Sequence[Any]
    ) -> dict[str, metrics.Score]:
        gold = self.array(values).astype(np.float64)
        predicted = np.array([prediction["value"] for prediction in predictions])
        return metrics.scored([metrics.regression(gold, predicted)], len(gold))


def _number(value: Any) -> float | None:
    """The number, if it is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


# --- sets of labels ---------------------------------------------------------------------------

_SEPARATORS = "|;,"


class LabelSets(Target):
    """Any number of C labels.

    A value is a list of names, a text of names with | ; or , between them (the first of these that
    occurs in the text) or a JSON list, or a dict of name -> 0 or 1, from a column a label.
    threshold: the probability from which on a label is predicted.
    """

    kind, selects = "label_sets", "micro_f1"

    def __init__(self, names: Sequence[str], threshold: float = 0.5) -> None:
        self.names = tuple(names)
        self.threshold = threshold
        self._numbers = {name: i for i, name in enumerate(names)}

    @classmethod
    def discover(cls, table: Table, role: str) -> LabelSets:
        """Those that occur, or that have a column. Raises ValueError where no row has any."""
        values = table.columns[role]
        sets = [_label_set(value) for value in values]
        found = {name for one in sets if one is not None for name in one}
        if not found:
            raise ValueError(f"{table.name}: {role}: no row has one, expected labels")
        if isinstance(values[0], dict):
            return cls(tuple(values[0]))
        return cls(in_order(found))

    @classmethod
    def of_config(cls, config: Any) -> LabelSets:
        return cls(Classes.of_config(config).names)

    def config(self) -> dict[str, Any]:
        return {**label_config(self.names), "problem_type": "multi_label_classification"}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names), "threshold": self.threshold}

    def problem(self, value: Any) -> Problem | None:
        names = _label_set(value)
        if names is None:
            return "no list of labels", f"got {value!r}"
        unknown = [name for name in names if name not in self._numbers]
        if unknown:
            return "unknown label", f"got {unknown[0]!r}, expected {listed(self.names)}"
        if len(set(names)) < len(names):
            return "a label twice", f"got {value!r}"
        return None

    def array(self, values: Sequence[Any]) -> Array:
        out = np.zeros((len(values), len(self.names)), np.float32)
        for row, value in zip(out, values, strict=True):
            row[[self._numbers[name] for name in _label_set(value) or ()]] = 1
        return out

    def predictions(self, logits: Array) -> list[Prediction]:
        probabilities = 0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))
        return [
            {
                "labels": [n for n, p in zip(self.names, row, strict=True) if p >= self.threshold],
                "probabilities": dict(zip(self.names, row, strict=True)),
            }
            for row in probabilities.tolist()
        ]

    def scores(
        self, predictions: Sequence[Prediction], values: Sequence[Any]
    ) -> dict[str, metrics.Score]:
        gold = self.array(values) > 0
        predicted = self.array([prediction["labels"] for prediction in predictions]) > 0
        return metrics.scored([metrics.label_sets(gold, predicted)], len(gold))


def _label_set(value: Any) -> list[str] | None:
    """The names in a value; None for what holds none, or what is not 0 or 1 in a label's column."""
    if isinstance(value, dict):
        flags = {name: _FLAGS.get(class_name(v) or "") for name, v in value.items()}
        return None if None in flags.values() else [n for n, flag in flags.items() if flag]
    if isinstance(value, str):
        if value.strip().startswith("["):
            try:
                return _label_set(json.loads(value))
            except ValueError:
                return None
        separator = next((s for s in _SEPARATORS if s in value), ",")
        return [name for name in map(str.strip, value.split(separator)) if name]
    if not isinstance(value, list | tuple):
        return None
    names = [class_name(name) for name in value]
    return None if None in names else [str(name) for name in names]


_FLAGS = {"0": False, "1": True, "false": False, "true": True}


# --- from what was saved ----------------------------------------------------------------------


def target_of(state: Mapping[str, Any]) -> Target:
    """The target whose ``state`` it is."""
    if state["kind"] == Classes.kind:
        return Classes(state["names"])
    if state["kind"] == LabelSets.kind:
        return LabelSets(state["names"], state["threshold"])
    return Number()
