"""Files of text as lines: plain, gzip or Zstandard, every error with its file and line."""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

COMPRESSIONS = (".gz", ".zst")
_BLOCK = 1 << 16


class DamagedFile(ValueError):
    """A compressed file that is cut short or holds what its format does not allow."""


def optional(name: str, purpose: str) -> ModuleType:
    """The module ``name``, which no installation of fastbert has to have.

    Raises ModuleNotFoundError that says what it is needed for and how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{purpose} needs {error.name}: pip install "fastbert[data]"', name=error.name
        ) from None


class Problems:
    """What was wrong with the input: an error, or a count where bad parts are to be skipped.

    count: bad parts so far.  examples: the first few, in words.
    """

    _MOST_EXAMPLES = 3

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self.examples: list[str] = []

    def meet(self, problem: str) -> None:
        """Raises ValueError with ``problem``, or counts it."""
        if not self.skip:
            raise ValueError(problem)
        self.count += 1
        if len(self.examples) < self._MOST_EXAMPLES:
            self.examples.append(problem)


def open_stream(path: Path, raw: BinaryIO) -> BinaryIO:
    """The decompressed bytes of ``raw``, the opened ``path``, whose name tells its compression.

    Reading raises DamagedFile where the compressed data are cut short or not in their format.
    """
    if path.suffix == ".gz":
        new_decoder = partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)  # 16: with gzip's header
        return io.BufferedReader(_Decompressed(raw, new_decoder, zlib.error))
    if path.suffix == ".zst":
        zstandard = optional("zstandard", f"{path}: a .zst file")
        new_decoder = zstandard.ZstdDecompressor().decompressobj
        return io.BufferedReader(_Decompressed(raw, new_decoder, zstandard.ZstdError))
    return raw


class _Decompressed(io.RawIOBase):
    """The members (gzip) or frames (Zstandard) of a compressed file, one behind the other.

    Unlike the libraries' own readers it tells a file that was cut short from one that ends.
    """

    def __init__(
        self, raw: BinaryIO, new_decoder: Callable[[], Any], failure: type[Exception]
    ) -> None:
        self._raw = raw
        self._new_decoder = new_decoder
        self._failure = failure
        self._decoder: Any = None  # of the member that is being read; None between two
        self._behind = b""  # bytes that were read behind the end of the last member
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._behind or self._raw.read(_BLOCK)
            if not block:
                if self._decoder is not None:
                    raise DamagedFile("the compressed data are cut short")
                return 0
            self._ready = memoryview(self._decompress(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self, block: bytes) -> bytes:
        self._behind = b""
        if self._decoder is None:
            block = block.lstrip(b"\0")  # padding between members, as tapes leave it
            if not block:
                return b""
            self._decoder = self._new_decoder()
        try:
            data = self._decoder.decompress(block)
        except self._failure as error:
            raise DamagedFile(f"the compressed data are damaged: {error}") from None
        if self._decoder.eof:
            self._behind = self._decoder.unused_data
            self._decoder = None
        return data


def lines(stream: BinaryIO, name: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end of line) of each line of UTF-8.

    A line that is not UTF-8, and what cannot be decompressed behind the last good line, is met by
    ``problems``.
    """
    number = 0
    while True:
        try:
            line = stream.readline()
        except DamagedFile as error:
            problems.meet(f"{name}: after line {number}: {error}")
            return
        if not line:
            return
        number += 1
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problems.meet(f"{name}: line {number} is not UTF-8: {error}")
            continue
        yield number, text.rstrip("\r\n")
