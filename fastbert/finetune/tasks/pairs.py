"""A class, or a number, for each pair of texts."""

from __future__ import annotations

from fastbert.config import BertConfig
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.sequence import SequenceTask
from fastbert.finetune.tasks.targets import Classes, Number, Target, are_classes


class Pairs(SequenceTask):
    """How two texts relate, both in one sequence (Devlin et al., arXiv 1810.04805, figure 4a).

    Labels are classes if they are names or a few whole numbers, and numbers on a scale if not.
    """

    name, summary = "pairs", "a class, or a number, for each pair of texts"
    texts = ("text", "text_pair")

    @classmethod
    def open(cls, table: Table, *, regression: bool | None = None) -> Pairs:
        """regression: whether labels are numbers on a scale; None: as they look."""
        table = cls.with_texts(table)
        if regression is None:
            regression = not are_classes(table.columns[cls.label])
        target: type[Classes] | type[Number] = Number if regression else Classes
        return cls(target.discover(table, cls.label))

    @classmethod
    def from_config(cls, config: BertConfig) -> Pairs:
        is_number = config.problem_type == "regression" or config.num_labels == 1
        target: Target = Number() if is_number else Classes.of_config(config)
        return cls(target)
