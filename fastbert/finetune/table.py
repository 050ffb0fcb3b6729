"""Table: labelled data as columns, each row knowing where it stood; BadRows: what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.data.files import Problems

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of named columns.

    name: of the file.  unit: what ``numbers`` count, "line", "record" or "row".
    numbers: (N,) int64, from 1: where in the file each row begins.
    columns: N values each.
    """

    name: str
    unit: str
    numbers: Array
    columns: dict[str, list[Any]]

    def __post_init__(self) -> None:
        wrong = {name: len(c) for name, c in self.columns.items() if len(c) != len(self)}
        if wrong:
            raise ValueError(f"columns: got lengths {wrong}, expected {len(self)}")

    @classmethod
    def of(cls, name: str = "data", /, **columns: Sequence[Any]) -> Table:
        """Of columns that are in memory, with rows numbered from 1."""
        rows = len(next(iter(columns.values()), ()))
        lists = {column: list(values) for column, values in columns.items()}
        return cls(name, "row", np.arange(1, rows + 1), lists)

    @classmethod
    def of_records(
        cls, name: str, unit: str, records: Iterable[tuple[int, Mapping[str, Any]]]
    ) -> Table:
        """Of (number, fields) pairs; a field that a record lacks is None."""
        columns: dict[str, list[Any]] = {}
        numbers: list[int] = []
        for row, (number, record) in enumerate(records):
            numbers.append(number)
            for field in record:
                if field not in columns:
                    columns[field] = [None] * row
            for field, values in columns.items():
                values.append(record.get(field))
        return cls(name, unit, np.array(numbers, np.int64), columns)

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, row: int) -> str:
        """Where a row stands: "train.csv, line 12"."""
        return f"{self.name}, {self.unit} {self.numbers[row]}"

    def rows(self, index: Sequence[int] | Array) -> Table:
        """The rows of these numbers, from 0, in that order."""
        chosen = np.asarray(index, np.int64)
        columns = {
            name: [values[i] for i in chosen.tolist()] for name, values in self.columns.items()
        }
        return Table(self.name, self.unit, self.numbers[chosen], columns)


class BadRows(Problems):
    """What is wrong with rows: an error at the first one or, with ``skip``, a count of all.

    count: rows left out.  examples: the first few, in words.  by_reason: how many for each reason.
    """

    def __init__(self, skip: bool = False) -> None:
        super().__init__(skip)
        self.by_reason: Counter[str] = Counter()

    def report(self, where: str, reason: str, detail: str = "") -> None:
        """A bad row. Raises ValueError "where: reason: detail" unless bad rows are skipped.

        reason: the same words for all rows that are bad in the same way.
        """
        self._add(reason, f"{where}: {reason}{f': {detail}' if detail else ''}")

    def meet(self, problem: str) -> None:
        """A part of a file that cannot be read."""
        self._add("unreadable", problem)

    def _add(self, reason: str, problem: str) -> None:
        super().meet(problem)
        self.by_reason[reason] += 1
