"""One of several classes for each text."""

from __future__ import annotations

from fastbert.config import BertConfig
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.sequence import SequenceTask
from fastbert.finetune.tasks.targets import Classes


class Classify(SequenceTask):
    """A class (Devlin et al., arXiv 1810.04805, section 4.1)."""

    name, summary = "classify", "one of several classes for each text"

    @classmethod
    def open(cls, table: Table) -> Classify:
        return cls(Classes.discover(cls.with_texts(table), cls.label))

    @classmethod
    def from_config(cls, config: BertConfig) -> Classify:
        return cls(Classes.of_config(config))
