"""Where text comes from: files of several formats, folders, globs and Hugging Face datasets.

Every source yields its documents in the same order each time, so that a run which was interrupted
finds its place again by counting them.
"""

from __future__ import annotations

import glob
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from os.path import exists
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.data import formats
from fastbert.data.files import COMPRESSIONS, Problems, open_stream, optional
from fastbert.data.sentences import MODES, RawDocument, sentences_of

HUB = "datasets:"
_BLOCK = 1 << 20
_ROWS = 1000  # of a dataset, read at a time


class Source(ABC):
    """Some documents.

    name: as messages call it.  size: in bytes as they are stored.
    """

    name: str
    size: int

    @abstractmethod
    def position(self) -> int:
        """How much of ``size`` has been read while documents are: for progress bars."""

    @abstractmethod
    def documents(self, problems: Problems) -> Iterator[RawDocument]:
        """All documents, from the first; a source without any is a problem."""

    @abstractmethod
    def sha256(self, advance: Callable[[int], object] = lambda done: None) -> str:
        """Digest of the content.

        advance: told how much of ``size`` was read since it was last told.
        """


def read_documents(
    texts: str | Path | Iterable[str | Path],
    *,
    text_field: str | None = None,
    sentences: str = "auto",
    skip_bad: bool = False,
) -> Iterator[list[str]]:
    """The documents of ``texts``, each a list of sentences; see ``find_sources`` for ``texts``.

    .txt: a blank line ends a document, and every other line is a paragraph. A file that begins with
        a heading `` = Title = `` is WikiText: its headings of level one begin documents, and
        the white space around its punctuation is undone.
    .jsonl, .parquet, datasets: one document a record, one paragraph a line of its text.
    text_field: the field or column of the text; None: ``text`` or the only one that holds texts.
    sentences: ``auto`` splits paragraphs by ``split_sentences``; ``lines`` takes each for one.
    skip_bad: leave out what is bad; else a ValueError names its file and line.
    """
    if sentences not in MODES:
        raise ValueError(f"sentences: got {sentences!r}, expected one of {', '.join(MODES)}")
    problems = Problems(skip_bad)
    for source in find_sources(texts, text_field=text_field):
        for document in source.documents(problems):
            yield sentences_of(document, sentences)


def find_sources(
    texts: str | Path | Iterable[str | Path], *, text_field: str | None = None
) -> list[Source]:
    """The sources that ``texts`` name, in the order given.

    Each of ``texts`` is a file (.txt, .jsonl, .parquet, or one of these behind which stands .gz or
    .zst), a folder (all such files in and below it, sorted by path), a pattern (its matches,
    sorted), or ``datasets:NAME[@CONFIG][:SPLIT[:COLUMN]]``, which the library ``datasets`` loads;
    SPLIT is train unless given, and may be a slice, train[:10%].
    Raises ValueError for what is none of these, FileNotFoundError for what is not there.
    """
    given: Sequence[Any] = [texts] if isinstance(texts, str | Path) else list(texts)
    if not given:
        raise ValueError("texts: got none, expected files, folders, patterns or datasets:NAME")
    found: list[Source] = []
    for text in given:
        if str(text).startswith(HUB):
            found.append(HubSource(str(text), text_field))
        else:
            found += [FileSource(path, text_field) for path in _files(str(text))]
    return found


def _files(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        if _format(path) is None:
            raise ValueError(f"texts: got {text}, expected {_expected()}")
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p) is not None)
        if not files:
            raise ValueError(f"texts: the folder {text} holds no {_expected()}")
        return files
    if glob.has_magic(text):
        matches = [match for match in sorted(glob.glob(text, recursive=True)) if exists(match)]
        if not matches:
            raise FileNotFoundError(f"texts: no file matches {text}")
        return [file for match in matches for file in _files(match)]
    raise FileNotFoundError(f"texts: {text}: no such file or folder")


def _format(path: Path) -> str | None:
    """The suffix of the format, without that of a compression; None for one that is not known."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix
    return suffix if suffix in formats.READERS else None


def _expected() -> str:
    return f"file in {', '.join(formats.READERS)}, with {' or '.join(COMPRESSIONS)} or without"


class FileSource(Source):
    """One file."""

    def __init__(self, path: Path, text_field: str | None = None) -> None:
        self.name = str(path)
        self.path = path
        self.size = path.stat().st_size
        self._text_field = text_field
        self._raw: BinaryIO | None = None

    def position(self) -> int:
        return 0 if self._raw is None else self._raw.tell()

    def documents(self, problems: Problems) -> Iterator[RawDocument]:
        suffix = _format(self.path)
        assert suffix is not None
        with self.path.open("rb") as raw:
            self._raw = raw
            stream = open_stream(self.path, raw)
            documents = formats.READERS[suffix](stream, self.name, self._text_field, problems)
            yield from _at_least_one(documents, self.name, problems)
            self._raw = None

    def sha256(self, advance: Callable[[int], object] = lambda done: None) -> str:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
        return digest.hexdigest()


# A split may be a slice of one: train[:10%]
_HUB_NAME = re.compile(
    r"datasets:(?P<name>[^@:]+)(@(?P<config>[^:]+))?"
    r"(:(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>[^:]+))?)?"
)


class HubSource(Source):
    """A dataset as the library ``datasets`` loads it, from its hub, its cache or a folder."""

    def __init__(self, spec: str, text_field: str | None = None) -> None:
        match = _HUB_NAME.fullmatch(spec)
        if match is None:
            raise ValueError(f"texts: got {spec}, expected {HUB}NAME[@CONFIG][:SPLIT[:COLUMN]]")
        self.name = spec
        library = optional("datasets", spec)
        try:
            data = library.load_dataset(
                match["name"], match["config"], split=match["split"] or "train"
            )
        except Exception as error:  # a hub fails in many ways, all of them an answer
            raise ValueError(f"{spec}: {error}") from error
        column = match["column"] or text_field
        texts = [n for n, f in data.features.items() if getattr(f, "dtype", "") in formats.TEXTS]
        self._column = formats.text_column(texts, data.column_names, column, spec)
        self._data = data.select_columns([self._column])
        self.size = self._data.data.nbytes
        self._rows = 0

    def position(self) -> int:
        return self.size * self._rows // max(1, len(self._data))

    def _texts(self) -> Iterator[Any]:
        for first in range(0, len(self._data), _ROWS):
            self._rows = min(first + _ROWS, len(self._data))
            yield from self._data[first : first + _ROWS][self._column]

    def documents(self, problems: Problems) -> Iterator[RawDocument]:
        documents = formats.records(self._texts(), self.name, "row", problems)
        yield from _at_least_one(documents, self.name, problems)

    def sha256(self, advance: Callable[[int], object] = lambda done: None) -> str:
        digest = hashlib.sha256()
        before = 0
        for text in self._texts():
            digest.update(repr(text).encode("utf-8", "surrogatepass"))
            advance(self.position() - before)
            before = self.position()
        return digest.hexdigest()


def _at_least_one(
    documents: Iterator[RawDocument], name: str, problems: Problems
) -> Iterator[RawDocument]:
    before = problems.count
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty and problems.count == before:
        problems.meet(f"{name}: holds no text")
