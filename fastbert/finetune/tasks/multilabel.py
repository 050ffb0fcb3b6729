"""Any number of labels for each text."""

from __future__ import annotations

from fastbert.config import BertConfig
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.sequence import SequenceTask
from fastbert.finetune.tasks.targets import LabelSets


class MultiLabel(SequenceTask):
    """A set of labels, by a binary cross entropy each."""

    name, summary = "multilabel", "any number of labels for each text"
    label = "labels"

    @classmethod
    def open(cls, table: Table) -> MultiLabel:
        return cls(LabelSets.discover(cls.with_texts(table), cls.label))

    @classmethod
    def from_config(cls, config: BertConfig) -> MultiLabel:
        return cls(LabelSets.of_config(config))
