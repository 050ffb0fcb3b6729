"""The formats of text files: a stream of bytes to its documents."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO

from fastbert.data.files import DamagedFile, Problems, lines, optional
from fastbert.data.sentences import RawDocument

Reader = Callable[[BinaryIO, str, str | None, Problems], Iterator[RawDocument]]
"""(stream, name for messages, field of the text or None, problems) -> documents"""

TEXTS = ("string", "large_string", "string_view")  # Arrow's types of text
_ROWS = 1000  # of a table, read at a time


# --- text -------------------------------------------------------------------------------------


def _text(
    stream: BinaryIO, name: str, text_field: str | None, problems: Problems
) -> Iterator[RawDocument]:
    texts = (text for _, text in lines(stream, name, problems))
    for first in texts:
        if first.strip():
            heading = _HEADING.fullmatch(first.strip())
            split = _plain if heading is None or heading[1] != "= " else _wikitext
            yield from split(chain([first], texts))


def _plain(texts: Iterable[str]) -> Iterator[RawDocument]:
    """A blank line ends a document."""
    document: list[str] = []
    for text in texts:
        if text.strip():
            document.append(text)
        elif document:
            yield RawDocument(document)
            document = []
    if document:
        yield RawDocument(document)


# " = = Gameplay = = ", of level two, without the blanks at its ends
_HEADING = re.compile(r"((?:= )+)([^=\s].*?)((?: =)+)")


def _wikitext(texts: Iterable[str]) -> Iterator[RawDocument]:
    """A heading of level one begins a document; the words of every heading stand as a line.

    A heading has a blank line on either side (or begins the file). That tells it from the lines
    that end up between two ``=`` where WikiText broke the key of a table into lines.
    """
    document: list[str] = []
    heading: re.Match[str] | None = None  # the last line, if it may be one
    after_blank = True
    for text in chain(texts, [""]):
        text = text.strip()
        if heading is not None:
            level, closing = len(heading[1]) // 2, len(heading[3]) // 2
            if text or level != closing:
                document.append(heading.string)
            else:
                if level == 1 and document:
                    yield RawDocument(document, wikitext=True)
                    document = []
                document.append(heading[2])
        heading = _HEADING.fullmatch(text) if after_blank else None
        if text and heading is None:
            document.append(text)
        after_blank = not text
    if document:
        yield RawDocument(document, wikitext=True)


# --- records ----------------------------------------------------------------------------------


def records(
    texts: Iterable[Any], name: str, unit: str, problems: Problems, first: int = 1
) -> Iterator[RawDocument]:
    """One document a text, one paragraph a line of it; a blank text is none.

    unit, first: what one of ``texts`` is called, and the number of the first: "row 1".
    """
    for number, text in enumerate(texts, first):
        where = f"{name}: {unit} {number}"
        if not isinstance(text, str):
            problems.meet(f"{where}: got {type(text).__name__}, expected a text")
        elif not _is_unicode(text):
            problems.meet(f"{where}: its text holds half of a surrogate pair")
        elif text.strip():
            yield RawDocument([line for line in text.splitlines() if line.strip()])


def _is_unicode(text: str) -> bool:
    r"""Whether UTF-8 can hold it; JSON's \ud800 makes texts that it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(
    stream: BinaryIO, name: str, text_field: str | None, problems: Problems
) -> Iterator[RawDocument]:
    for number, line in lines(stream, name, problems):
        if not line.strip():
            continue
        where = f"{name}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.meet(f"{where} is not JSON: {error}")
            continue
        if not isinstance(record, dict):
            problems.meet(f"{where}: got {type(record).__name__}, expected an object")
            continue
        if text_field is None:
            held = [field for field, value in record.items() if isinstance(value, str)]
            text_field = _guess(held)
        text = record.get(text_field) if text_field is not None else None
        if isinstance(text, str):
            yield from records([text], name, "line", problems, first=number)
        else:
            wanted = "text" if text_field is None else text_field
            problems.meet(
                f"{where}: no text in field {wanted!r}; its fields are {', '.join(record)}"
            )


def text_column(texts: Sequence[str], columns: Sequence[str], wanted: str | None, name: str) -> str:
    """The column to read: ``wanted``, or ``text``, or the only one.

    texts: the columns that hold texts, of all ``columns``. Raises ValueError that names them.
    """
    found = _guess(texts) if wanted is None else wanted
    if found is None or found not in texts:
        raise ValueError(
            f"{name}: no text in column {wanted or 'text'!r}; its columns are {', '.join(columns)}"
        )
    return found


def _guess(fields: Sequence[str]) -> str | None:
    if "text" in fields:
        return "text"
    return fields[0] if len(fields) == 1 else None


def _parquet(
    stream: BinaryIO, name: str, text_field: str | None, problems: Problems
) -> Iterator[RawDocument]:
    arrow = optional("pyarrow", f"{name}: a .parquet file")
    parquet = optional("pyarrow.parquet", f"{name}: a .parquet file")
    try:
        # A table's index stands at its end: what is compressed as a whole is read as a whole.
        seekable = stream if stream.seekable() else io.BytesIO(stream.read())
        table = parquet.ParquetFile(seekable)
        texts = [field.name for field in table.schema_arrow if str(field.type) in TEXTS]
    except (DamagedFile, arrow.ArrowException, OSError) as error:
        problems.meet(f"{name}: {error}")
        return
    column = text_column(texts, table.schema_arrow.names, text_field, name)
    yield from records(_column(table, column, name, problems), name, "row", problems)


def _column(table: Any, column: str, name: str, problems: Problems) -> Iterator[Any]:
    """The values of a column as far as they can be read."""
    arrow = optional("pyarrow", f"{name}: a .parquet file")
    row = 0
    try:
        for batch in table.iter_batches(_ROWS, columns=[column]):
            yield from batch.column(0).to_pylist()
            row += batch.num_rows
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problems.meet(f"{name}: after row {row}: {error}")


READERS: dict[str, Reader] = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
"""Suffix of a file -> how it is read."""
