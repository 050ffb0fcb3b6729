"""The right one of several continuations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.data.batching import pack
from fastbert.finetune import metrics
from fastbert.finetune.features import Features, Frame, Ragged, shorten, tokenise, windows
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.base import Task, text_problem
from fastbert.finetune.tasks.targets import (
    Outcomes,
    Prediction,
    Problem,
    class_name,
    listed,
    softmax,
)
from fastbert.models import BertForMultipleChoice

Array = np.ndarray

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choice(Task):
    """Which choice goes with a text (Devlin et al., arXiv 1810.04805, section 4.4).

    ``choices`` are a list, or a column each. A ``question``, where there is one, stands before
    every choice. Each choice is a sequence of its own, [CLS] text [SEP] question choice [SEP], cut
    at the end of the longer part if it is too long.

    names: what the label calls each choice: 0, 1, …, or 1, 2, …, or A, B, …; None: as many of
    0, 1, … as the first row that has choices has.
    """

    name, summary = "choice", "the right one of several continuations of a text"
    model = BertForMultipleChoice
    selects = "accuracy"

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = None if names is None else tuple(names)

    @classmethod
    def open(cls, table: Table) -> Choice:
        """Raises ValueError where all rows have the same label, or none that calls a choice."""
        rows = range(len(table))
        counts = Counter(len(_choices(table, i)) for i in rows if _no_choices(table, i) is None)
        if not counts:
            raise ValueError(f"{table.name}: choices: no row has two or more")
        count = counts.most_common(1)[0][0]
        labels = {name for name in map(class_name, table.columns["label"]) if name is not None}
        if len(labels) < 2:
            held = f"all rows have {next(iter(labels))!r}" if labels else "no row has one"
            raise ValueError(f"{table.name}: label: {held}, expected two labels or more")
        return cls(_names(labels, count, table.name))

    def config(self) -> dict[str, Any]:
        return {"problem_type": None}

    def state(self) -> dict[str, Any]:
        return {"task": self.name, "names": self.names}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Choice:
        return cls(state["names"])

    @classmethod
    def from_config(cls, config: BertConfig) -> Choice:
        return cls(None)

    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        texts = [role for role in ("text", "question") if role in table.columns]
        for role in texts:
            problem = text_problem(table.columns[role][row], role)
            if problem is not None:
                return problem
        problem = _no_choices(table, row)
        if problem is not None:
            return problem
        names = self._names(table)
        count = len(_choices(table, row))
        if count != len(names):
            return "another number of choices", f"got {count}, expected {len(names)}"
        name = class_name(table.columns["label"][row]) if labelled else names[0]
        if name is None:
            return "no label", f"got {table.columns['label'][row]!r}"
        if name not in names:
            return "unknown label", f"got {name!r}, expected {listed(names)}"
        return None

    def _names(self, table: Table) -> tuple[str, ...]:
        if self.names is not None:
            return self.names
        rows = (row for row in range(len(table)) if _no_choices(table, row) is None)
        return tuple(map(str, range(len(_choices(table, next(rows))))))

    def encode(
        self,
        table: Table,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        stride: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """stride: is not used; what is too long is cut, and counted."""
        rows, count = len(table), len(self._names(table))
        asked = table.columns.get("question")
        seconds = [
            choice if asked is None else f"{asked[row]} {choice}"
            for row in range(rows)
            for choice in _choices(table, row)
        ]
        texts = tokenise(table.columns["text"], tokenizer)
        owner = np.repeat(np.arange(rows), count)
        first = Ragged(texts.values, texts.starts[owner], texts.lengths[owner])
        frame = Frame.of(tokenizer, pair=True)
        first, second, cut = shorten(first, tokenise(seconds, tokenizer), max_length - frame.size)
        made = windows(first, second, frame, max_length, 0)
        lengths = made.lengths.reshape(rows, count)
        per_feature = {"lengths": lengths}
        if labelled:
            per_feature["labels"] = self._labels(table)
        return Features(
            lengths.sum(1),
            np.arange(rows),
            {"input_ids": made.input_ids, "token_type_ids": made.token_type_ids},
            per_feature,
            truncated=int(cut.reshape(rows, count).any(1).sum()),
        )

    def collate(self, examples: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
        sequences = []
        for example in examples:
            ends = np.cumsum(example["lengths"])[:-1]
            parts = (np.split(example[name], ends) for name in ("input_ids", "token_type_ids"))
            for ids, types in zip(*parts, strict=True):
                sequences.append({"input_ids": ids, "token_type_ids": types})
        inputs: dict[str, Any] = {"batch": pack(sequences)[0]}
        inputs["num_choices"] = len(examples[0]["lengths"])
        if "labels" in examples[0]:
            inputs["labels"] = torch.tensor([int(example["labels"]) for example in examples])
        return inputs

    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        """{"choice", "label", "probabilities"}: the number of the choice from 0, and its name."""
        names = self._names(table)
        probabilities = softmax(np.stack(outputs))
        return [
            {
                "choice": best,
                "label": names[best],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for best, row in zip(
                probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True
            )
        ]

    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, metrics.Score]:
        names, gold, predicted, confidence = self.outcomes(predictions, table)
        right = gold == predicted
        measures = [metrics.means(accuracy=right), metrics.calibration(confidence, right)]
        return metrics.scored(measures, len(gold))

    def outcomes(self, predictions: Sequence[Prediction], table: Table) -> Outcomes:
        return Outcomes(
            self._names(table),
            self._labels(table),
            np.array([one["choice"] for one in predictions]),
            np.array([one["probabilities"][one["label"]] for one in predictions]),
        )

    def _labels(self, table: Table) -> Array:
        numbers = {name: i for i, name in enumerate(self._names(table))}
        return np.array([numbers[str(class_name(value))] for value in table.columns["label"]])


def _choices(table: Table, row: int) -> list[Any]:
    """Those of a row; none where the column holds something else."""
    value = table.columns["choices"][row]
    if isinstance(value, dict):  # of several columns
        return list(value.values())
    return value if isinstance(value, list) else []


def _no_choices(table: Table, row: int) -> Problem | None:
    choices = _choices(table, row)
    if len(choices) < 2:
        return "no choices", f"got {table.columns['choices'][row]!r}, expected a list of texts"
    problems = (text_problem(choice, "choice") for choice in choices)
    return next((problem for problem in problems if problem is not None), None)


def _names(labels: set[str], count: int, name: str) -> list[str]:
    """How labels call ``count`` choices: the way that fits the most of those that occur."""
    ways = [
        [str(i) for i in range(count)],
        [str(i) for i in range(1, count + 1)],
        list(_LETTERS[:count]),
        list(_LETTERS[:count].lower()),
    ]
    best = max(ways, key=lambda way: len(labels.intersection(way)))
    if not labels.intersection(best):
        raise ValueError(
            f"{name}: label: got {listed(sorted(labels))}, expected {listed(ways[0])} or "
            f"{listed(ways[2])}"
        )
    return best
