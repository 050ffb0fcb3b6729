"""Files that are there whole or not at all, whatever stops the writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """A path to write for each of ``targets``; together they take their places, or none does.

        with replacing(folder / "a.json", folder / "b.json") as (a, b):
            a.write_text(...)
            b.write_text(...)

    Each path is a hidden name in its target's folder, which must exist; all of them must have been
    written when the block ends. Then they reach the disk, are renamed in the order given, and the
    renames reach the disk. An exception before the renames leaves every target as it was. Whatever
    happens, no temporary file stays.

    A file system renames one file at a time: let the last target vouch for the others, by checksums
    say, so that a machine which stops between two renames is noticed when they are read.

    Raises IsADirectoryError at once for a target that is a folder, which no file can replace.
    """
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f"{target}: is a folder, expected a file or nothing")
    temporaries = tuple(t.with_name(f".{t.name}.{os.getpid()}.tmp") for t in targets)
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        for folder in dict.fromkeys(target.parent for target in targets):
            sync(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have what stands at ``path`` reach the disk: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
