"""Labelled data from files of many formats and from Hugging Face datasets, as a Table."""

from __future__ import annotations

import re
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastbert.data.files import COMPRESSIONS, DamagedFile, open_stream, optional
from fastbert.finetune.formats import READERS
from fastbert.finetune.table import BadRows, Table

__all__ = ["BadRows", "Table", "read_table"]

HUB = "datasets:"
# A split may be a slice of one: train[:10%]
_HUB_NAME = re.compile(r"datasets:(?P<name>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def read_table(
    source: str | Path,
    *,
    split: str = "train",
    format: str | None = None,
    bad: BadRows | None = None,
) -> Table:
    """The rows of a file or of a dataset.

    source: a file in one of the formats below, behind which .gz or .zst may stand, or
        ``datasets:NAME[@CONFIG][:SPLIT]``, which the library ``datasets`` loads.
    split: of a dataset whose name says none.
    format: for a file whose suffix does not tell it.
    bad: what is to happen with rows that cannot be read; None: an error.

    csv: RFC 4180, UTF-8. The first line is the header, unless a field of it is a number or stands
        in its column again; then columns are called column1, column2, …
    tsv, and txt with TABs: fields as they are, without quoting.  txt without: a text a line.
    jsonl: an object a line.  json: a list of objects, or SQuAD's format.  parquet.
    conll: a word a line, its tags behind it; tokens and tags are the first and the last column.
    conllu: with the columns tokens, lemma, upos, xpos, …

    Raises ValueError that names the file, and the line of what cannot be read: bytes that are not
    UTF-8, a row with more or fewer fields than the header, two columns of one name, no rows.
    FileNotFoundError for a file that is not there.
    """
    bad = BadRows() if bad is None else bad
    if str(source).startswith(HUB):
        table = _dataset(str(source), split)
    else:
        table = _file(Path(source), format, bad)
    if not len(table):
        skipped = f" ({bad.count} bad ones left out)" if bad.count else ""
        raise ValueError(f"{table.name}: holds no rows{skipped}")
    return table


def _file(path: Path, format: str | None, bad: BadRows) -> Table:
    if format is None:
        plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
        format = plain.suffix.lower().lstrip(".")
    if format not in READERS:
        raise ValueError(
            f"{path}: got the format {format!r}, expected one of {', '.join(READERS)}, "
            f"with {' or '.join(COMPRESSIONS)} behind it or not"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as raw:
        stream = cast(BufferedReader, open_stream(path, raw))
        try:
            return READERS[format](stream, str(path), bad)
        except DamagedFile as error:
            raise ValueError(f"{path}: {error}") from None


def _dataset(spec: str, split: str) -> Table:
    match = _HUB_NAME.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec}: expected {HUB}NAME[@CONFIG][:SPLIT]")
    library = optional("datasets", spec)
    try:
        data = library.load_dataset(match["name"], match["config"], split=match["split"] or split)
    except Exception as error:  # a hub fails in many ways, all of them an answer
        raise ValueError(f"{spec}: {error}") from error
    columns = {name: _named(values, data.features[name]) for name, values in data[:].items()}
    return Table(spec, "row", np.arange(1, len(data) + 1), columns)


def _named(values: list[Any], feature: Any) -> list[Any]:
    """Classes, and lists of classes, by their names; the rest as it is."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    if names is None:
        return values

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(one) for one in value]
        # By convention -1 stands for a label that is kept secret.
        return None if value is None or value < 0 else names[value]

    return [name(value) for value in values]
