"""The formats of labelled data: a stream of bytes to a Table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from io import BufferedReader, BytesIO
from typing import Any

import numpy as np

from fastbert.data.files import lines, optional
from fastbert.finetune.table import BadRows, Table

Reader = Callable[[BufferedReader, str, BadRows], Table]
"""(stream, name for messages, bad rows) -> table"""

_LONGEST_NAME = 64  # characters: a longer first field is no column's name
_LONGEST_FIELD = 2**30  # characters; csv's own limit, 2**17, is less than a long document


# --- csv and tsv ------------------------------------------------------------------------------


class _Lines:
    """Lines for csv.reader, which takes several for a record with line ends inside quotes.

    first: the number of the first line that was taken since it was set to 0.
    """

    def __init__(self, stream: BufferedReader, name: str, bad: BadRows) -> None:
        self._lines = lines(stream, name, bad)
        self.first = 0

    def __iter__(self) -> Iterator[str]:
        for number, text in self._lines:
            self.first = self.first or number
            yield text + "\n"


Records = list[tuple[int, list[str]]]  # (line, fields)


def _csv(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """RFC 4180. Where the first line holds no comma, but a semicolon or a TAB, that separates."""
    first = stream.peek(1).split(b"\n", 1)[0]
    separator = next((s for s in (",", ";", "\t") if s.encode() in first), ",")
    taken = _Lines(stream, name, bad)
    reader = csv.reader(taken, delimiter=separator, strict=True)
    records: Records = []
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        while True:
            taken.first = 0
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                bad.report(f"{name}, line {taken.first}", "not CSV", str(error))
                continue
            if fields:
                records.append((taken.first, fields))
    finally:
        csv.field_size_limit(limit)
    return _with_header(records, name, bad)


def _tsv(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """Fields between TABs as they are: a quotation mark is a character like any other."""
    records = [(n, text.split("\t")) for n, text in lines(stream, name, bad) if text]
    return _with_header(records, name, bad)


def _with_header(records: Records, name: str, bad: BadRows) -> Table:
    if not records:
        return Table(name, "line", np.zeros(0, np.int64), {})
    first, names = records[0]
    header = _is_header(records)
    if header:
        names = [field.strip() or f"unnamed{i}" for i, field in enumerate(names, 1)]
        twice = sorted({field for field in names if names.count(field) > 1})
        if twice:
            raise ValueError(f"{name}, line {first}: two columns are called {', '.join(twice)}")
    else:
        names = [f"column{i}" for i in range(1, len(names) + 1)]
    rows: Records = []
    for number, fields in records[1:] if header else records:
        where = f"{name}, line {number}"
        if len(fields) != len(names):
            expected = f"got {len(fields)} fields, expected {len(names)}"
            bad.report(where, "ragged row", f"{expected}: {', '.join(names)}")
        elif header and fields == records[0][1]:
            bad.report(where, "the header again")
        else:
            rows.append((number, fields))
    numbers = np.array([number for number, _ in rows], np.int64)
    columns = zip(*(fields for _, fields in rows), strict=True) if rows else [()] * len(names)
    return Table(name, "line", numbers, dict(zip(names, map(list, columns), strict=True)))


def _is_header(records: Records) -> bool:
    """Whether the first record names columns.

    It does not if a field of it is a number or long, or stands in its column again: a label does.
    """
    first = records[0][1]
    others = [fields for _, fields in records[1:]]
    if any(is_number(field) or len(field) > _LONGEST_NAME for field in first):
        return False
    if first in others:
        return True
    return not any(
        field and any(len(fields) > i and fields[i] == field for fields in others)
        for i, field in enumerate(first)
    )


def is_number(text: str) -> bool:
    """Whether ``float`` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _txt(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """Fields between TABs; without any TAB, one text a line, in a column ``text``."""
    if b"\t" in stream.peek(1).split(b"\n", 1)[0]:
        return _tsv(stream, name, bad)
    texts = [(n, {"text": text}) for n, text in lines(stream, name, bad) if text.strip()]
    return Table.of_records(name, "line", texts)


# --- JSON -------------------------------------------------------------------------------------


def _json_lines(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in lines(stream, name, bad):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad.report(f"{name}, line {number}", "not JSON", str(error))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                found = f"got {type(record).__name__}"
                bad.report(f"{name}, line {number}", "not a JSON object", found)

    return Table.of_records(name, "line", records())


def _json(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """A list of objects, or SQuAD's {"data": [{"paragraphs": …}]}."""
    try:
        values = json.loads(stream.read().decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON: {error.msg}") from None
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise ValueError(f"{name}: got {type(values).__name__}, expected a list of objects")
    if values and all(isinstance(one, dict) and "paragraphs" in one for one in values):
        return Table.of_records(name, "question", _squad(values, name, bad))
    records = []
    for number, record in enumerate(values, 1):
        if isinstance(record, dict):
            records.append((number, record))
        else:
            found = f"got {type(record).__name__}"
            bad.report(f"{name}, record {number}", "not a JSON object", found)
    return Table.of_records(name, "record", records)


def _squad(
    articles: list[dict[str, Any]], name: str, bad: BadRows
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Questions, numbered through, as Hugging Face's data sets have them."""
    before = 0
    for place, article in enumerate(articles, 1):
        try:
            asked = [(p["context"], q) for p in article["paragraphs"] for q in p["qas"]]
        except (KeyError, TypeError) as error:
            bad.report(f"{name}, article {place}", *_not_squad(error))
            continue
        for number, (context, question) in enumerate(asked, before + 1):
            try:
                record = {
                    "id": question.get("id"),
                    "title": article.get("title"),
                    "question": question["question"],
                    "context": context,
                    "answers": _as_lists(question.get("answers")),
                }
            except (KeyError, TypeError, AttributeError) as error:
                bad.report(f"{name}, question {number}", *_not_squad(error))
            else:
                yield number, record
        before += len(asked)


def _as_lists(answers: list[dict[str, Any]] | None) -> dict[str, list[Any]] | None:
    if answers is None:
        return None
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def _not_squad(error: Exception) -> tuple[str, str]:
    return "not in SQuAD's format", f"{type(error).__name__}: {error}"


# --- sentences of tagged words ----------------------------------------------------------------

_CONLLU = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
# 3-4: what the words 3 and 4 are contracted to; 5.1: a word that is understood, not written.
_NO_WORD = re.compile(r"\d+[-.]\d+")


def _conllu(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """CoNLL-U: a column a field, ``tokens`` among them; a row is a sentence, its values are lists.

    Contractions (3-4) and words that are not written (5.1) are left out, as the analysis does.
    """
    return Table.of_records(name, "line", _sentences(stream, name, bad, _CONLLU, "\t"))


def _conll(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    """A word a line, its tags behind it between blanks, an empty line behind each sentence.

    Columns ``tokens`` (the first field), ``tags`` (the last), ``column2``, … between them. A file
    whose first word has ten fields between TABs, 1 the first of them, is CoNLL-U.
    """
    head = stream.peek(1)
    words = (line for line in head.split(b"\n") if line.strip() and not line.startswith(b"#"))
    first = next(words, b"").split(b"\t")
    if len(first) == len(_CONLLU) and first[0] in (b"1", b"1-2"):
        return _conllu(stream, name, bad)
    return Table.of_records(name, "line", _sentences(stream, name, bad, None, None))


def _sentences(
    stream: BufferedReader,
    name: str,
    bad: BadRows,
    fields: tuple[str, ...] | None,
    separator: str | None,
) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """(line of its first word, field -> a value a word) of each sentence.

    fields: their names; None: as many as the first word has.
    """
    words: list[list[str]] = []
    first, ragged = 0, False

    def done() -> Iterator[tuple[int, dict[str, list[str]]]]:
        if words and not ragged:
            columns = zip(*words, strict=True)
            yield first, dict(zip(fields or (), map(list, columns), strict=True))

    for number, line in lines(stream, name, bad):
        if not line.strip():
            yield from done()
            words, ragged = [], False
            continue
        if line.startswith("-DOCSTART-") or (separator is not None and line.startswith("#")):
            continue
        word = line.split(separator)
        if fields is None:
            fields = _names(len(word))
        if separator is not None and _NO_WORD.fullmatch(word[0]):
            continue
        if len(word) != len(fields) and not ragged:
            found = f"got {len(word)} fields, expected {len(fields)}"
            bad.report(f"{name}, line {number}", "ragged row", f"{found}: {', '.join(fields)}")
            ragged = True
        if not words:
            first = number
        words.append(word)
    yield from done()


def _names(fields: int) -> tuple[str, ...]:
    between = [f"column{i}" for i in range(2, fields)]
    return ("tokens", *between, "tags")[: max(fields, 1)]


# --- parquet ----------------------------------------------------------------------------------


def _parquet(stream: BufferedReader, name: str, bad: BadRows) -> Table:
    arrow = optional("pyarrow", f"{name}: a .parquet file")
    parquet = optional("pyarrow.parquet", f"{name}: a .parquet file")
    try:
        table = parquet.read_table(BytesIO(stream.read()))
        columns = {field: table[field].to_pylist() for field in table.column_names}
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return Table(name, "row", np.arange(1, table.num_rows + 1), columns)


READERS: dict[str, Reader] = {
    "csv": _csv,
    "tsv": _tsv,
    "txt": _txt,
    "jsonl": _json_lines,
    "json": _json,
    "parquet": _parquet,
    "conll": _conll,
    "conllu": _conllu,
}
"""Name of a format, which is the suffix of its files, -> how it is read."""
