"""evaluate and predict: what a trained model, float or quantised, says of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune.columns import TARGETS, as_roles, guess_columns
from fastbert.finetune.data import Labelled, Source, read_source
from fastbert.finetune.inference import run_model
from fastbert.finetune.metrics import Score
from fastbert.finetune.saved import load_task, text_folder
from fastbert.finetune.sentence_encoder import SentenceEncoder, Vectors
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import Task
from fastbert.finetune.tasks.targets import Prediction


@dataclass(frozen=True)
class Evaluation:
    """predictions: one for each row of ``table``.  scores: None where rows have no labels.
    left_out: bad rows, by reason.  windowed: rows that were read in several windows.
    truncated: rows that lost tokens."""

    task: Task
    table: Table
    predictions: list[Prediction]
    scores: dict[str, Score] | None
    left_out: dict[str, int]
    windowed: int
    truncated: int

    @property
    def score(self) -> float:
        """The one that a checkpoint is chosen by. Raises ValueError without labels."""
        if self.scores is None:
            raise ValueError(f"{self.table.name}: has no labels, expected some to score with")
        return self.scores[self.task.selects].value


class Examiner:
    """Labelled rows, read once, that any number of models are to be tried on.

    folder: of the model that was fine-tuned: its task, labels and tokenizer.
    data: rows.  task: for a folder without ``task.json``.  columns: role -> column; the others are
        as in training, or guessed.
    labelled: whether rows have labels; False: only predictions are wanted.
    """

    def __init__(
        self,
        folder: str | Path,
        data: Source,
        *,
        task: str | None = None,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        labelled: bool = True,
        skip_bad: bool = False,
        max_length: int | None = None,
    ) -> None:
        folder = text_folder(folder)
        self.task, reading, trained_on = load_task(folder, task)
        bad = BadRows(skip_bad)
        table = read_source(data, "test", bad)
        # As in training, where this table has the same columns.
        given = {role: name for role, name in trained_on.items() if _has(table, name)}
        if not labelled:
            given = {role: name for role, name in given.items() if role not in TARGETS}
        given.update(columns or {})
        found = guess_columns(table, self.task.name, given, labelled=labelled)
        table = self.task.check(as_roles(table, found), bad, labelled=labelled)
        features = self.task.encode(
            table,
            load_tokenizer(folder),
            max_length=max_length or reading.max_length,
            stride=reading.stride,
            labelled=labelled,
        )
        self.data = Labelled(features, table)
        self.labelled, self.left_out = labelled, dict(bad.by_reason)

    def __call__(
        self, model: nn.Module, *, batch_tokens: int = 4096, device: torch.device | str = "cpu"
    ) -> Evaluation:
        """What ``model`` says, computed on ``device``, where it is."""
        if self.task.model is SentenceEncoder and not isinstance(model, SentenceEncoder):
            model = Vectors(model)
        features, table = self.data
        outputs = run_model(model, self.task, features, batch_tokens, torch.device(device))
        predictions = self.task.decode(outputs, features, table)
        scores = self.task.scores(predictions, table) if self.labelled else None
        return Evaluation(
            self.task, table, predictions, scores, self.left_out, features.windowed,
            features.truncated,
        )  # fmt: skip


def _has(table: Table, column: str | Sequence[str]) -> bool:
    names = [column] if isinstance(column, str) else column
    return all(name in table.columns for name in names)


def evaluate(
    model: nn.Module,
    folder: str | Path,
    data: Source,
    *,
    batch_tokens: int = 4096,
    device: torch.device | str = "cpu",
    **reading: Any,
) -> Evaluation:
    """What ``model`` says of ``data``, and how right it is.

    model: of ``fastbert.finetune.load``, of ``fastbert.load``, or of one's own, on ``device``.
    folder: where it came from.  reading: as ``Examiner`` takes it: task, columns, labelled, …
    Raises ValueError for rows that cannot be used, and a folder whose task is not known.
    """
    return Examiner(folder, data, **reading)(model, batch_tokens=batch_tokens, device=device)
