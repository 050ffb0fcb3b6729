"""Sources: a corpus as a numbered row of examples, cut as the papers cut theirs; numpy only.

Where a corpus is cut is drawn from the seed alone and known at once for all examples: ``lengths``
stands from the beginning, any process can make any example, and nothing is kept between two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fastbert.data import Corpus
from fastbert.pretrain.examples import NONE, OPTIONAL_COLUMNS, Example, Vocabulary, frame
from fastbert.pretrain.pieces import Pieces, chain

Array = np.ndarray


class Source(ABC):
    """Examples of at most ``max_length`` tokens, [CLS] and [SEP] among them.

    seed: of the cuts.  duplicates: how often the corpus is gone through, each time cut anew where
    cuts are random (BERT's dupe_factor, 10).  columns: the optional columns that examples have.
    lengths: (E,) int64, of each example in tokens, for ``fastbert.data.TokenBatches``.
    Raises ValueError for bad arguments and for columns that the corpus lacks.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    specials: ClassVar[int] = 2  # special tokens in a full example
    cuts_sentences: ClassVar[bool] = True  # those longer than an example
    lengths: Array

    def __init__(
        self,
        corpus: Corpus,
        max_length: int,
        *,
        seed: int = 0,
        duplicates: int = 1,
        columns: Iterable[str] = (),
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.columns = frozenset(columns)
        if max_length < 8:
            raise ValueError(f"max_length: got {max_length}, expected 8 or more")
        if duplicates < 1:
            raise ValueError(f"duplicates: got {duplicates}, expected 1 or more")
        if not self.columns <= OPTIONAL_COLUMNS:
            unknown, known = self.columns - OPTIONAL_COLUMNS, sorted(OPTIONAL_COLUMNS)
            raise ValueError(f"columns: got {sorted(unknown)}, expected some of {known}")
        if not corpus.num_documents:
            raise ValueError(f"corpus: {corpus.folder} has no {corpus.split} documents")
        if "unit" in self.columns and not corpus.has_units:
            raise ValueError(f"corpus: {corpus.folder} was prepared without a list of units")
        self.corpus = corpus
        self.vocabulary = vocabulary or Vocabulary.of(corpus)
        self.max_length = max_length
        self.room = max_length - self.specials
        self.pieces = Pieces(corpus, self.room if self.cuts_sentences else corpus.num_tokens)
        plans = [self._plan(np.random.default_rng((seed, n))) for n in range(duplicates)]
        # (E, k) int64: what the examples are made of, a row each.
        self._rows = np.concatenate(plans)
        self.lengths = self._lengths()

    def __len__(self) -> int:
        return len(self._rows)

    @abstractmethod
    def _plan(self, rng: np.random.Generator) -> Array:
        """The rows of one way through the corpus."""

    @abstractmethod
    def _lengths(self) -> Array: ...

    @abstractmethod
    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The example of that number; ``rng`` draws what differs from epoch to epoch."""

    def text(self, first: int, end: int) -> Example:
        """The tokens first .. end of the corpus, without special tokens."""
        corpus = self.corpus
        ids = corpus.tokens(first, end).astype(np.int64)
        optional: dict[str, Any] = {}
        if "capitalised" in self.columns:
            optional["capitalised"] = corpus.capitalised(first, end)
        if "elsewhere" in self.columns:
            optional["elsewhere"] = self._elsewhere(ids, first, end)
        if "unit" in self.columns:
            units = corpus.units(first, end)
            sizes = units[:, 1] - units[:, 0]
            inside = np.repeat(units[:, 1] - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
            optional["unit"] = np.full(len(ids), NONE)
            optional["unit"][inside] = np.repeat(np.arange(len(units)), sizes)
        return Example(
            ids=ids,
            token_type_ids=np.zeros(len(ids), np.int64),
            sentence=self.pieces.numbers(first, end),
            word_start=self.vocabulary.word_starts[ids],
            group=np.full(len(ids), NONE),
            **optional,
        )

    def _elsewhere(self, ids: Array, first: int, end: int) -> Array:
        """Whether each token occurs in its document outside of first .. end."""
        found = np.zeros(len(ids), bool)
        for start, stop in self.pieces.documents_in(first, end):
            seen = np.zeros(self.vocabulary.size, bool)
            seen[self.corpus.tokens(start, max(start, first))] = True
            seen[self.corpus.tokens(min(stop, end), stop)] = True
            here = slice(max(start, first) - first, min(stop, end) - first)
            found[here] = seen[ids[here]]
        return found


class FullSentences(Source):
    """Whole sentences, one after the other, as many as there is room for; they go on over the ends
    of documents, where a [SEP] stands (RoBERTa, arXiv 1907.11692, section 4.2)."""

    name = "full-sentences"
    paper = "RoBERTa, arXiv 1907.11692"
    summary = "whole sentences, on over the ends of documents"

    def _plan(self, rng: np.random.Generator) -> Array:
        starts, pieces = self.pieces.starts, self.pieces
        # Tokens before each sentence, with a [SEP] before each document.
        costs = starts.copy()
        costs[1:] += np.cumsum(pieces.begins_document)
        free = costs[:-1] + pieces.begins_document  # the [SEP] at its own start is none
        following = np.searchsorted(costs, free + self.room, side="right") - 1
        first = chain(following)
        return np.stack((starts[first], starts[following[first]]), 1)

    def _lengths(self) -> Array:
        first, end = self._rows.T
        starts = self.pieces.document_starts
        inner = np.searchsorted(starts, end) - np.searchsorted(starts, first, "right")
        return end - first + inner + self.specials

    def example(self, index: int, rng: np.random.Generator) -> Example:
        first, end = self._rows[index].tolist()
        starts = self.pieces.document_starts
        inner = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, end)]
        text = self.text(first, end)
        return frame([text], self.vocabulary.special, separated=inner - first)


class Segments(Source):
    """Single segments of whole sentences of one document (SpanBERT, arXiv 1907.10529, section 3.3).

    short: the part of the sequences whose length is at most a random number of tokens from 2 on
        rather than ``max_length`` (Devlin et al.'s short_seq_prob).
    """

    name = "segments"
    paper = "SpanBERT, arXiv 1907.10529"
    summary = "whole sentences of one document"

    def __init__(self, corpus: Corpus, max_length: int, *, short: float = 0.1, **options: Any):
        self.short = checked_short(short)
        super().__init__(corpus, max_length, **options)

    def _plan(self, rng: np.random.Generator) -> Array:
        pieces, starts = self.pieces, self.pieces.starts
        room = random_rooms(rng, len(pieces), self.room, self.short)
        fitting = np.searchsorted(starts, starts[:-1] + room, side="right") - 1
        # A sentence that is longer than a short sequence is one nonetheless.
        following = np.clip(fitting, np.arange(len(pieces)) + 1, pieces.document_end)
        first = chain(following)
        return np.stack((starts[first], starts[following[first]]), 1)

    def _lengths(self) -> Array:
        return self._rows[:, 1] - self._rows[:, 0] + self.specials

    def example(self, index: int, rng: np.random.Generator) -> Example:
        first, end = self._rows[index].tolist()
        return frame([self.text(first, end)], self.vocabulary.special)


class Streams(Source):
    """Sequences of exactly ``max_length`` tokens of the corpus as one stream, in which each
    sentence ends with [SEP]; only the last may be shorter (XLM, arXiv 1901.07291, section 3.3: 256
    tokens). A [CLS] comes first."""

    name = "streams"
    paper = "XLM, arXiv 1901.07291"
    summary = "exactly as many tokens as asked for, wherever sentences end"
    specials = 1
    cuts_sentences = False

    def _plan(self, rng: np.random.Generator) -> Array:
        total = self._ends[-1]
        first = np.arange(0, total, self.room)
        return np.stack((first, np.minimum(first + self.room, total)), 1)

    @cached_property
    def _ends(self) -> Array:
        """(sentences,) int64: the place in the stream behind the [SEP] of each."""
        return self.pieces.starts[1:] + np.arange(1, len(self.pieces) + 1)

    def _lengths(self) -> Array:
        return self._rows[:, 1] - self._rows[:, 0] + self.specials

    def example(self, index: int, rng: np.random.Generator) -> Example:
        first, end = self._rows[index].tolist()
        separators, before = self._separators(first, end)
        is_text = np.ones(end - first, bool)
        is_text[separators] = False
        text = self.text(first - before, end - before - len(separators))
        rows = np.full(1 + end - first, -1)
        rows[1:][is_text] = np.arange(len(text))
        example = text.take(rows)
        example.ids[rows < 0] = self.vocabulary.special.sep
        example.ids[0] = self.vocabulary.special.cls
        return example

    def _separators(self, first: int, end: int) -> tuple[Array, int]:
        """Places of the [SEP]s in first .. end of the stream, and how many come before."""
        low, high = np.searchsorted(self._ends, (first, end), side="right")
        return self._ends[low:high] - 1 - first, int(low)


def checked_short(short: float) -> float:
    if not 0.0 <= short <= 1.0:
        raise ValueError(f"short: got {short!r}, expected 0 .. 1")
    return short


def random_rooms(rng: np.random.Generator, count: int, room: int, short: float) -> Array:
    """(count,) int64: ``room``, but for a part ``short`` a random number of 2 .. room."""
    drawn = rng.random(count) < short
    return np.where(drawn, rng.integers(2, room + 1, size=count), room)
