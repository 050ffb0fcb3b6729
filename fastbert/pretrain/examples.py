"""Example: one sequence on its way from a corpus to a batch, a row a token; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastbert.data import Corpus
from fastbert.data.tokenizer import SpecialIds

Array = np.ndarray

NONE = -1  # in a column of numbers: this token has none
OPTIONAL_COLUMNS = frozenset({"unit", "capitalised", "elsewhere"})

# What a row that is a special token holds. A special token is a word of its own.
_SPECIAL: dict[str, Any] = {
    "ids": 0,
    "token_type_ids": 0,
    "sentence": NONE,
    "word_start": True,
    "group": NONE,
    "unit": NONE,
    "capitalised": False,
    "elsewhere": False,
}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What objectives know of a tokenizer.

    word_starts: (V,) bool, false for the continuing pieces (``##``).
    counts: (V,) int64, how often each token occurs in the corpus; None unless asked for.
    """

    special: SpecialIds
    word_starts: Array
    counts: Array | None = None
    ordinary: Array = field(init=False)  # (V - 5,) int64: all ids but the special ones

    def __post_init__(self) -> None:
        ordinary = np.setdiff1d(np.arange(len(self.word_starts)), self.special)
        object.__setattr__(self, "ordinary", ordinary)

    @classmethod
    def of(cls, corpus: Corpus, *, counts: bool = False) -> Vocabulary:
        """That of a corpus.  counts: whether to count its tokens, which reads them all once."""
        counted = corpus.token_counts if counts else None
        return cls(corpus.special_ids, corpus.word_starts, counted)

    @property
    def size(self) -> int:
        return len(self.word_starts)


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence of S tokens.

    ids, token_type_ids: (S,) int64.
    sentence: (S,) int64, the number of the token's sentence within the example; NONE marks the
        special tokens and others that objectives let alone.
    word_start: (S,) bool: the token begins a word.
    group: (S,) int64: NONE while no objective has changed the token or asks for it; tokens that
        were masked as one (a word, a span) share a number.
    unit: (S,) int64: tokens of one phrase or entity share a number, others have NONE.
    capitalised: (S,) bool.  elsewhere: (S,) bool: occurs in its document outside of its segment.
        These three are None unless the source was told to read them.
    position_ids: (S,) int64; None counts from 0.
    visibility: (S, 3) int64, who sees whom (``fastbert.pretrain.encode.attention_bias``); None
        lets every token see every other.
    relation: which of the source's relations holds between the two segments, or NONE.
    targets: by objective, arrays by name; see ``fastbert.pretrain.collate`` for the names.
    """

    ids: Array
    token_type_ids: Array
    sentence: Array
    word_start: Array
    group: Array
    unit: Array | None = None
    capitalised: Array | None = None
    elsewhere: Array | None = None
    position_ids: Array | None = None
    visibility: Array | None = None
    relation: int = NONE
    targets: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def replace(self, **fields: Any) -> Example:
        """The same example with some fields changed."""
        # Called a few times an example: dataclasses.replace would take four times as long.
        assert fields.keys() <= self.__dict__.keys(), fields.keys()
        example = object.__new__(Example)
        example.__dict__.update(self.__dict__, **fields)
        return example

    def asking(self, objective: str, **targets: Array) -> Example:
        """The same example with the targets of one objective more."""
        return self.replace(targets={**self.targets, objective: targets})

    @property
    def ordinary(self) -> Array:
        """(S,) bool: the token is text, and not [CLS], [SEP] and the like."""
        return self.sentence != NONE

    @property
    def free(self) -> Array:
        """(S,) bool: ordinary, and no objective has taken it yet."""
        return (self.sentence != NONE) & (self.group == NONE)

    def words(self) -> Array:
        """(S,) int64: the number of each token's word, ascending. Where a text was cut in the
        middle of a word, what is left of it is one."""
        begins = self.word_start.copy()
        begins[:1] = True
        begins[1:] |= self.sentence[1:] != self.sentence[:-1]
        return np.cumsum(begins) - 1

    def take(self, rows: Array) -> Example:
        """The rows of the given numbers, in their order; -1 is a special token, its id yet to be
        filled in. Targets stay as they are: what they say of places must still be true.
        """
        assert self.position_ids is None and self.visibility is None
        special = rows < 0
        columns = {}
        for name, blank in _SPECIAL.items():
            column = getattr(self, name)
            if column is not None:
                taken = column[rows] if len(column) else np.empty(len(rows), column.dtype)
                taken[special] = blank
                columns[name] = taken
        return self.replace(**columns)

    def append(self, other: Example) -> Example:
        """This text with that of ``other`` behind it, whose sentences and units are numbered on."""
        columns = {}
        for name in _SPECIAL:
            first, second = getattr(self, name), getattr(other, name)
            if first is not None:
                if name in ("sentence", "unit"):
                    shift = first.max(initial=NONE) + 1
                    second = np.where(second == NONE, NONE, second + shift)
                columns[name] = np.concatenate((first, second))
        return self.replace(**columns)


def frame(
    segments: list[Example], special: SpecialIds, *, separated: Array | None = None
) -> Example:
    """[CLS] first [SEP] (second [SEP]), with token types 0 and, for the second segment, 1.

    separated: rows of a single segment before which a [SEP] stands too.
    """
    text = segments[0] if len(segments) == 1 else segments[0].append(segments[1])
    ends = np.cumsum([len(segment) for segment in segments])
    inner = ends[:-1] if separated is None else separated
    rows = np.arange(len(text))
    if len(inner):
        rows = np.insert(rows, inner, -1)
    rows = np.concatenate(([-1], rows, [-1]))
    example = text.take(rows)
    example.ids[rows < 0] = special.sep
    example.ids[0] = special.cls
    if len(segments) == 2:
        example.token_type_ids[ends[0] + 2 :] = 1
    return example
