"""A number for each text."""

from __future__ import annotations

from fastbert.config import BertConfig
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.sequence import SequenceTask
from fastbert.finetune.tasks.targets import Number


class Regress(SequenceTask):
    """A number, by the squared error."""

    name, summary = "regress", "a number for each text"

    @classmethod
    def open(cls, table: Table) -> Regress:
        return cls(Number.discover(cls.with_texts(table), cls.label))

    @classmethod
    def from_config(cls, config: BertConfig) -> Regress:
        return cls(Number())
