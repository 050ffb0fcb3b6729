"""What the tasks share that give a text, or a pair of texts, one label of some kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from fastbert.finetune.features import Features, Frame, tokenise, windows
from fastbert.finetune.metrics import Score
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.base import Task, text_problem
from fastbert.finetune.tasks.targets import Outcomes, Prediction, Problem, Target, target_of
from fastbert.models import BertForSequenceClassification

Array = np.ndarray


class SequenceTask(Task):
    """A label for each row.

    Long texts become windows, of a pair those of the longer text. In training each has the row's
    label; in evaluation the mean of their logits is the row's.

    texts: roles of the texts.  label: role of the label.
    """

    model = BertForSequenceClassification
    texts: ClassVar[tuple[str, ...]] = ("text",)
    label: ClassVar[str] = "label"

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def selects(self) -> str:
        return self.target.selects

    def config(self) -> dict[str, Any]:
        return self.target.config()

    def state(self) -> dict[str, Any]:
        return {"task": self.name, "target": self.target.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SequenceTask:
        return cls(target_of(state["target"]))

    @classmethod
    def with_texts(cls, table: Table) -> Table:
        """The rows that have all texts."""
        return table.rows([i for i in range(len(table)) if _no_text(table, i, cls.texts) is None])

    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        problem = _no_text(table, row, self.texts)
        if problem is None and labelled:
            problem = self.target.problem(table.columns[self.label][row])
        return problem

    def encode(
        self,
        table: Table,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        stride: int | None = None,
        labelled: bool = True,
    ) -> Features:
        first, *second = (tokenise(table.columns[role], tokenizer) for role in self.texts)
        frame = Frame.of(tokenizer, pair=bool(second))
        made = windows(first, second[0] if second else None, frame, max_length, stride)
        labels = {}
        if labelled:
            labels["labels"] = self.target.array(table.columns[self.label])[made.row]
        return Features(
            made.lengths,
            made.row,
            {"input_ids": made.input_ids, "token_type_ids": made.token_type_ids},
            labels,
            truncated=int(made.truncated.sum()),
        )

    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        logits = np.zeros((len(table), len(outputs[0])))
        np.add.at(logits, features.row, np.stack(outputs))
        windows_of_row = np.bincount(features.row, minlength=len(table))
        return self.target.predictions(logits / windows_of_row[:, None])

    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, Score]:
        return self.target.scores(predictions, table.columns[self.label])

    def outcomes(self, predictions: Sequence[Prediction], table: Table) -> Outcomes | None:
        return self.target.outcomes(predictions, table.columns[self.label])


def _no_text(table: Table, row: int, roles: Sequence[str]) -> Problem | None:
    for role in roles:
        problem = text_problem(table.columns[role][row], role)
        if problem is not None:
            return problem
    return None
