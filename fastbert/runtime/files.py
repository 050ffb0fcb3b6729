"""encode_file: a text file of any size to a file of vectors, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastbert.atomic import replacing, sync
from fastbert.runtime.encoder import Encoder

Advance = Callable[[int, int], None]
"""(bytes of the input that are done, rows that are done)"""

_LINES = 2048  # encoded, and made safe on disk, at a time
_LONGEST_LINE = 1 << 20  # bytes; a longer line is cut: no model reads so many tokens
_HEADER = 128  # bytes, room for any number of rows


def encode_file(
    encoder: Encoder,
    source: str | Path,
    target: str | Path,
    *,
    restart: bool = False,
    advance: Advance = lambda done, rows: None,
    **encoding: Any,
) -> int:
    """Write the vector of every line of ``source`` to ``target``, (n, H) fp32 as .npy; returns n.

    source: UTF-8, one text a line; an empty line is a text too. Of a line longer than a MiB the
        first MiB counts.
    restart: begin anew; else a run that was interrupted goes on after the last rows that it put on
        the disk, if source, model and ``encoding`` are the same.
    advance: told now and then how far it is.  encoding: arguments of ``Encoder.encode``.

    Until it is complete the file is TARGET.part, and TARGET.progress says how much of it counts.
    Raises ValueError, naming the file, for text that is not UTF-8, and for a part that belongs to
    something else.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: its folder does not exist")
    job = _Job(encoder, source, target, encoding)
    if restart:
        job.forget()
    with source.open("rb") as lines, job.part.open("ab") as rows:
        done, count = job.resume(lines, rows)
        for texts, end in _blocks(source, lines, count):
            rows.write(encoder.encode(texts, **encoding).data)
            rows.flush()
            sync(job.part)
            count += len(texts)
            job.note(end, count)
            advance(end, count)
    with job.part.open("r+b") as rows:
        rows.write(_header(count, encoder.hidden_size))
    sync(job.part)
    os.replace(job.part, target)
    sync(target.parent)
    job.progress.unlink(missing_ok=True)
    return count


class _Job:
    """What one output file is made of, and how far it has come."""

    def __init__(
        self, encoder: Encoder, source: Path, target: Path, encoding: dict[str, Any]
    ) -> None:
        self.part = target.with_name(target.name + ".part")
        self.progress = target.with_name(target.name + ".progress")
        self.row_bytes = 4 * encoder.hidden_size
        stat = source.stat()
        self.identity = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _ends_digest(source, stat.st_size),
            "model": encoder.facts["crc32"],
            "encoding": {name: repr(value) for name, value in sorted(encoding.items())},
        }

    def forget(self) -> None:
        for path in (self.part, self.progress):
            path.unlink(missing_ok=True)

    def resume(self, lines: BinaryIO, rows: BinaryIO) -> tuple[int, int]:
        """Put both files where the work goes on: (bytes of the input done, rows done)."""
        done = count = 0
        try:
            noted = json.loads(self.progress.read_text(encoding="utf-8"))
        except FileNotFoundError:
            noted = None
        except ValueError as error:
            raise ValueError(
                f"{self.progress}: not JSON ({error}); --restart begins anew"
            ) from error
        if noted is not None:
            differs = [key for key in self.identity if noted.get(key) != self.identity[key]]
            if differs:
                raise ValueError(
                    f"{self.part}: was begun with another input, model or options (differs in "
                    f"{', '.join(differs)}); --restart begins anew"
                )
            done, count = noted["input_bytes"], noted["rows"]
        if rows.tell() < _HEADER + count * self.row_bytes:
            if count:
                raise ValueError(f"{self.part}: is shorter than {self.progress} says; --restart")
            rows.truncate(0)
            rows.write(bytes(_HEADER))
        rows.truncate(_HEADER + count * self.row_bytes)
        lines.seek(done)
        return done, count

    def note(self, input_bytes: int, rows: int) -> None:
        """Record how far it is, at once or not at all."""
        values = {**self.identity, "input_bytes": input_bytes, "rows": rows}
        with replacing(self.progress) as (path,):
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _blocks(path: Path, file: BinaryIO, row: int) -> Iterator[tuple[list[str], int]]:
    """(texts, where the file stands after them); ``row`` is the first text's number."""
    texts: list[str] = []
    while line := file.readline(_LONGEST_LINE):
        whole = line.endswith(b"\n") or len(line) < _LONGEST_LINE
        if not whole:
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
        try:
            # A cut may fall inside a character.
            texts.append(line.rstrip(b"\r\n").decode("utf-8", "strict" if whole else "ignore"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {row + len(texts) + 1} is not UTF-8: {error}") from None
        if len(texts) == _LINES:
            yield texts, file.tell()
            row += len(texts)
            texts = []
    if texts:
        yield texts, file.tell()


def _ends_digest(path: Path, size: int, length: int = 1 << 20) -> str:
    """SHA-256 of the first and the last MiB: size and time of change say the rest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(length))
        file.seek(max(0, size - length))
        digest.update(file.read(length))
    return digest.hexdigest()


def _header(rows: int, width: int) -> bytes:
    """The first ``_HEADER`` bytes of a .npy of (rows, width) fp32."""
    file = BytesIO()
    values = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, values)
    text = file.getvalue()[10:].rstrip(b"\n ")
    length = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"
