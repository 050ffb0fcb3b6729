"""Task: from the rows of a table to a model's inputs, and from its outputs to scores.

The way of labelled data through a task:

    table = read_table("train.csv", bad=bad)                     # fastbert.finetune.reading
    columns = guess_columns(table, "classify", {})               # role -> column; to be shown
    table = as_roles(table, columns)                             # columns are called by role now
    task = TASKS["classify"].open(table)                         # discovers the labels
    table = task.check(table, bad)                               # without the rows that are bad
    model = task.model.from_pretrained(folder, **task.config())
    features = task.encode(table, tokenizer, max_length=128)

    loader = DataLoader(features, batch_sampler=TokenBatches(features.lengths, ...),
                        collate_fn=task.collate)
    for inputs in loader:                                        # {"batch": PackedBatch, "labels"}
        loss = model(**inputs).loss

    outputs = [None] * len(features)                             # predict: in any order
    for indices in batches:
        inputs = task.collate([features[i] for i in indices])
        for i, one in zip(indices, task.split(model(**inputs), inputs)):
            outputs[i] = one
    predictions = task.decode(outputs, features, table)          # one a row of the table
    scores = task.scores(predictions, table)                     # {"accuracy": Score(...), ...}

What is to be predicted on is read with ``guess_columns(..., labelled=False)``, and checked and
encoded with ``labelled=False``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.data.batching import pack
from fastbert.finetune.columns import ROLES, TARGETS
from fastbert.finetune.features import Features
from fastbert.finetune.metrics import Score
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks.targets import Outcomes, Prediction, Problem
from fastbert.models.bert import BertPreTrained

Array = np.ndarray
Tensor = torch.Tensor


class Task(ABC):
    """One kind of labelled data, and what is made of it.

    name: as the command line has it; its roles are ``columns.ROLES[name]``.
    summary: one line.  model: the class that is trained.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    model: ClassVar[type[BertPreTrained]]

    @property
    @abstractmethod
    def selects(self) -> str:
        """The score that chooses the best checkpoint; the higher the better."""

    @classmethod
    @abstractmethod
    def open(cls, table: Table) -> Task:
        """The task of a training set, whose labels are discovered: sorted, numbers as such.

        Rows that ``check`` would leave out for something else than their label do not count.
        Raises ValueError, naming the file, where there is nothing to learn: one class only.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Changes for ``model.from_pretrained``: labels and the like."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What ``from_state`` makes the task from again, kept beside the model: JSON."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any]) -> Task:
        """The task whose ``state`` it is."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: BertConfig) -> Task:
        """The task of a checkpoint that was fine-tuned elsewhere, as far as its config tells."""

    @abstractmethod
    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        """What is wrong with a row: a reason and details."""

    def check(self, table: Table, bad: BadRows, *, labelled: bool = True) -> Table:
        """The rows that can be used; the others are reported to ``bad``.

        Raises ValueError for a table without one of the task's columns, and where no row is left.
        """
        _check_roles(self.name, table, labelled)
        good = []
        for row in range(len(table)):
            problem = self.problem(table, row, labelled)
            if problem is None:
                good.append(row)
            else:
                bad.report(table.at(row), *problem)
        if not good:
            raise ValueError(f"{table.name}: none of its {len(table)} rows can be used")
        return table if len(good) == len(table) else table.rows(good)

    @abstractmethod
    def encode(
        self,
        table: Table,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        stride: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """The features of a table that was checked.

        max_length: tokens of a window, special ones included.  stride: that neighbouring windows
        share; None: a quarter.  labelled: whether features hold labels.
        """

    def collate(self, examples: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
        """Examples of ``encode`` as the arguments of ``model.forward``: ``batch``, a PackedBatch,
        and tensors of labels, on the CPU."""
        to_pack = {"input_ids", "token_type_ids"} | self.per_token
        packed = [{n: x for n, x in example.items() if n in to_pack} for example in examples]
        batch, inputs = pack(packed)
        stacked = {
            name: torch.from_numpy(np.stack([example[name] for example in examples]))
            for name in examples[0].keys() - to_pack
        }
        return {"batch": batch, **inputs, **stacked}

    per_token: ClassVar[frozenset[str]] = frozenset()
    """Names of the arrays of an example, beside ids, that have a row for each token."""

    def split(self, output: Any, inputs: Mapping[str, Any]) -> list[Array]:
        """What ``decode`` needs of a model's output, for each example of a batch: float32."""
        return list(output.logits.detach().float().cpu().numpy())

    @abstractmethod
    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        """A prediction, which JSON can hold, for each row of ``table``.

        outputs: what ``split`` gave, a feature.
        """

    @abstractmethod
    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, Score]:
        """How good predictions are, one for each row of a labelled table."""

    def outcomes(self, predictions: Sequence[Prediction], table: Table) -> Outcomes | None:
        """For a confusion matrix and a plot of calibration; None where there are no classes."""
        return None


def _check_roles(task: str, table: Table, labelled: bool) -> None:
    for role, how in ROLES[task].items():
        if how.needed and role not in table.columns and (labelled or role not in TARGETS):
            raise ValueError(
                f"{table.name}: no column for {role!r}, which {task} needs; its columns are "
                f"{', '.join(table.columns)}"
            )


def text_problem(value: Any, role: str) -> Problem | None:
    """What is wrong with a text: that it is none, or holds nothing that can be seen."""
    if not isinstance(value, str):
        missing = value is None or value != value  # NaN is not equal to itself
        return (f"no {role}", "") if missing else (f"{role} is not a text", f"got {value!r}")
    # BERT's tokenizer drops what cannot be printed, and U+FFFD, which stands for bad bytes.
    if not any(c.isprintable() and c not in " \ufffd" for c in value):
        return f"empty {role}", ""
    return unicode_problem(value, role)


def unicode_problem(value: str, role: str) -> Problem | None:
    """Whether a text holds what UTF-8 cannot, as JSON's \\ud800 makes it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{role} is not Unicode", "it holds half of a surrogate pair"
    return None
