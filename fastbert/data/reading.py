"""Sources as one stream of documents in chunks, each with its place, so that reading can go on.

Going on skips sources that are done; of the one that it begins in, documents are read and counted
again, which takes a small part of the time that tokenising them took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastbert.data.files import Problems
from fastbert.data.sentences import RawDocument, sentences_of
from fastbert.data.sources import Source


class Place(NamedTuple):
    """Where reading stands: behind ``documents`` documents of the source of number ``source``.

    skipped, problems: bad parts of the input up to there, and the first few in words.
    """

    source: int
    documents: int
    skipped: int
    problems: list[str]


START = Place(0, 0, 0, [])


class Chunk(NamedTuple):
    """Consecutive documents.

    end: the place behind them.  position: how much of the sources' sizes has been read, about.
    """

    documents: list[RawDocument]
    end: Place
    position: int


def read_chunks(
    sources: Sequence[Source], skip_bad: bool, characters: int, start: Place = START
) -> Iterator[Chunk]:
    """The documents behind ``start``, in chunks of ``characters`` or a document more.

    Chunks that begin at the end of an earlier one are those that would have followed it. The last
    may be empty: it tells of what is bad behind the last document.
    """
    problems = Problems(skip_bad)
    documents: list[RawDocument] = []
    held = 0
    before = sum(source.size for source in sources[: start.source])
    number = 0
    for index in range(start.source, len(sources)):
        source = sources[index]
        known = start.documents if index == start.source else 0
        number = 0
        for number, document in enumerate(source.documents(problems), 1):
            if number <= known:
                problems.count, problems.examples = start.skipped, list(start.problems)
                continue
            documents.append(document)
            held += sum(map(len, document.lines))
            if held >= characters:
                end = Place(index, number, problems.count, list(problems.examples))
                yield Chunk(documents, end, before + source.position())
                documents, held = [], 0
        before += source.size
    end = Place(len(sources) - 1, number, problems.count, list(problems.examples))
    yield Chunk(documents, end, before)


class Sample:
    """The sentences of every ``step``-th document; can be gone through again and again.

    advance: told how much of the sources' sizes was read since it was last told.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        skip_bad: bool,
        sentences: str,
        step: int,
        advance: Callable[[int], object],
    ) -> None:
        self._sources = sources
        self._skip_bad = skip_bad
        self._sentences = sentences
        self._step = step
        self._advance = advance

    def __iter__(self) -> Iterator[list[str]]:
        problems = Problems(self._skip_bad)
        number = 0
        for source in self._sources:
            told = 0
            for document in source.documents(problems):
                if number % self._step == 0:
                    yield sentences_of(document, self._sentences)
                number += 1
                position = source.position()
                self._advance(position - told)
                told = position
            self._advance(source.size - told)
