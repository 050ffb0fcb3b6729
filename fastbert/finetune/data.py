"""What a run of fine-tuning, or an evaluation, reads: from files to tables and features."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune import saved
from fastbert.finetune.columns import Columns, as_roles, guess_columns
from fastbert.finetune.features import Features
from fastbert.finetune.reading import read_table
from fastbert.finetune.setting import Setting
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS, Task
from fastbert.models.checkpoint import load_config
from fastbert.nn.heads import IGNORED

Source = str | Path | Table
"""A file, ``datasets:NAME``, or a table."""

_HELD_OUT = 0.1  # of the training rows, where no development rows are given


class Labelled(NamedTuple):
    """Rows, and what a model reads of them."""

    features: Features
    table: Table


@dataclass(frozen=True)
class Data:
    """What a run reads: tables and features of the rows that can be used.

    columns: role -> column.  left_out: bad rows, by reason.
    """

    task: Task
    columns: Columns
    reading: saved.Reading
    train: Labelled
    dev: Labelled
    test: Labelled | None
    left_out: dict[str, int]

    def describe(self) -> dict[str, Any]:
        """Plain data: sizes, and what windows and cuts there are."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {
            "task": self.task.name,
            "columns": self.columns,
            "left_out": self.left_out,
            **{
                name: {
                    "rows": len(part.table),
                    "tokens": int(part.features.lengths.sum()),
                    "windowed": part.features.windowed,
                    "truncated": part.features.truncated,
                }
                for name, part in parts.items()
                if part is not None
            },
        }

    def sources(self) -> dict[str, str]:
        """Where the rows came from."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: part.table.name for name, part in parts.items() if part is not None}

    def class_counts(self) -> list[int] | None:
        """Rows, or tokens, of each class in training; None where there are no classes."""
        features = self.train.features
        labels = features.per_feature.get("labels", features.per_token.get("labels"))
        classes = self.task.config().get("num_labels", 0)
        if labels is None or labels.ndim != 1 or labels.dtype.kind != "i" or classes < 2:
            return None
        return np.bincount(labels[labels != IGNORED], minlength=classes).tolist()


def read_data(
    model: str | Path,
    task: str,
    train: Source,
    dev: Source | None = None,
    test: Source | None = None,
    *,
    setting: Setting,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    skip_bad: bool = False,
) -> Data:
    """Read, check and tokenise. Without ``dev`` a tenth of ``train`` is held out.

    Raises ValueError that names file and line of the first bad row, unless ``skip_bad``.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    folder = saved.text_folder(model)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    limit = saved.longest(folder, config)
    max_length = setting.max_length or limit
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length: got {max_length}, expected at most {config.max_position_embeddings}, the "
            "positions of the model"
        )
    reading = saved.Reading(max_length, setting.stride)
    bad = BadRows(skip_bad)
    table = read_source(train, "train", bad)
    found = guess_columns(table, task, columns)
    table = as_roles(table, found)
    opened = TASKS[task].open(table)
    tables = {"train": opened.check(table, bad)}
    for name, source in (("dev", dev), ("test", test)):
        if source is not None:
            other = read_source(source, {"dev": "validation"}.get(name, name), bad)
            tables[name] = opened.check(as_roles(other, guess_columns(other, task, found)), bad)
    if dev is None:
        tables["train"], tables["dev"] = _held_out(tables["train"])

    def labelled(name: str) -> Labelled | None:
        if name not in tables:
            return None
        features = opened.encode(tables[name], tokenizer, **reading._asdict())
        return Labelled(features, tables[name])

    parts = [labelled(name) for name in ("train", "dev", "test")]
    assert parts[0] is not None and parts[1] is not None
    return Data(opened, found, reading, parts[0], parts[1], parts[2], dict(bad.by_reason))


def read_source(source: Source, split: str, bad: BadRows) -> Table:
    """The rows of ``source``; ``split`` is that of a dataset whose name says none."""
    return source if isinstance(source, Table) else read_table(source, split=split, bad=bad)


def _held_out(table: Table) -> tuple[Table, Table]:
    """(nine tenths, a tenth), drawn at random, always the same."""
    if len(table) < 2:
        raise ValueError(f"{table.name}: got {len(table)} rows, expected 2 or more, or --dev")
    order = np.random.default_rng(0).permutation(len(table))
    count = max(1, round(_HELD_OUT * len(table)))
    return table.rows(np.sort(order[count:])), table.rows(np.sort(order[:count]))


def digest(features: Features) -> int:
    """CRC-32 of all that the model is to read."""
    value = 0
    for arrays in (features.per_token, features.per_feature):
        for name in sorted(arrays):
            value = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), value)
    return value
