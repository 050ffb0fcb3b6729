"""One shard of a corpus: documents, sentences and tokens in one safetensors file.

The arrays of a file, for T tokens, S sentences, D documents and U units:

    tokens             (T,) uint16, or uint32 for a vocabulary of 65536 or more; no special tokens
    sentence_offsets   (S + 1,) int64: sentence s holds tokens offsets[s] .. offsets[s + 1]
    document_offsets   (D + 1,) int64: document d holds sentences offsets[d] .. offsets[d + 1]
    capitalised        (ceil(T / 8),) uint8, a bit a token, the lowest first: whether the word of
                       the token begins with a capital letter in the raw text, which an uncased
                       tokenizer does not tell (ERNIE 2.0, arXiv 1907.12412, section 4.2.1)
    unit_starts,       (U,) int64, in tokens, ascending and apart: phrases and entities (ERNIE 1.0,
    unit_ends          arXiv 1904.09223); in every shard of a corpus made with units, else in none

No document is divided between two shards, and no sentence or document is empty.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from fastbert.atomic import replacing
from fastbert.data.encode import Encoded
from fastbert.data.tokenizer import token_dtype

Array = np.ndarray

_BLOCK = 1 << 20
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}


class ShardRecord(NamedTuple):
    """What corpus.json says of a shard: its file, relative to the corpus, and what that holds.

    size: of the file, in bytes.  crc32: of all of them.
    """

    file: str
    documents: int
    sentences: int
    tokens: int
    units: int
    size: int
    crc32: int


def write_shard(
    folder: Path, file: str, parts: Sequence[Encoded], vocab_size: int, *, units: bool
) -> ShardRecord:
    """Write ``parts``, one behind the other, to ``folder / file``; its folder is made if missing.

    units: whether the shard has arrays of units. The file is there whole or not at all.
    """
    dtype = token_dtype(vocab_size)
    tokens = _joined([part.tokens for part in parts], dtype)
    sentence_lengths = _joined([part.sentence_lengths for part in parts])
    document_lengths = _joined([part.document_lengths for part in parts])
    arrays = {
        "tokens": tokens,
        "sentence_offsets": _offsets(sentence_lengths),
        "document_offsets": _offsets(document_lengths),
        "capitalised": np.packbits(
            _joined([part.capitalised for part in parts], bool), bitorder="little"
        ),
    }
    if units:
        first = _offsets(np.array([len(part.tokens) for part in parts], np.int64))
        pairs = list(zip(first.tolist(), parts, strict=False))  # the last offset has no part
        arrays["unit_starts"] = _joined([part.unit_starts + n for n, part in pairs])
        arrays["unit_ends"] = _joined([part.unit_ends + n for n, part in pairs])
    data = save(arrays)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (temporary,):
        temporary.write_bytes(data)
    return ShardRecord(
        file,
        documents=len(document_lengths),
        sentences=len(sentence_lengths),
        tokens=len(tokens),
        units=len(arrays.get("unit_starts", ())),
        size=len(data),
        crc32=zlib.crc32(data),
    )


def _joined(arrays: Sequence[Array], dtype: Any = np.int64) -> Array:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _offsets(lengths: Array) -> Array:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


class Shard:
    """The arrays of a shard's file, as read-only views of its mapping.

    path: the file.  record: what it has to hold.  Opening checks sizes and shapes, not contents:
    ``verify`` does. Raises ValueError that names the file; a FileNotFoundError where it is missing.
    """

    tokens: Array
    sentence_offsets: Array
    document_offsets: Array
    capitalised: Array
    unit_starts: Array
    unit_ends: Array

    def __init__(self, path: Path, record: ShardRecord, vocab_size: int, *, units: bool) -> None:
        self.path = path
        self.record = record
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: this shard of the corpus is missing") from None
        if size != record.size:
            raise ValueError(
                f"{path}: this shard has {size} bytes, expected {record.size}: it was cut short or "
                "changed"
            )
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tokens, sentences, documents = record.tokens, record.sentences, record.documents
        expected: dict[str, tuple[Any, int]] = {
            "tokens": (token_dtype(vocab_size), tokens),
            "sentence_offsets": (np.int64, sentences + 1),
            "document_offsets": (np.int64, documents + 1),
            "capitalised": (np.uint8, -(-tokens // 8)),
        }
        if units:
            expected |= {name: (np.int64, record.units) for name in ("unit_starts", "unit_ends")}
        for name, array in _views(path, mapping, expected).items():
            setattr(self, name, array)

    def verify(self) -> None:
        """Read the whole file. Raises ValueError if its bytes are not those that were written."""
        found = 0
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                found = zlib.crc32(block, found)
        if found != self.record.crc32:
            raise ValueError(
                f"{self.path}: this shard is corrupt: its CRC-32 is {found:08x}, expected "
                f"{self.record.crc32:08x}"
            )


def _views(
    path: Path, mapping: mmap.mmap, expected: Mapping[str, tuple[Any, int]]
) -> dict[str, Array]:
    """The arrays of a safetensors file: 8 bytes with the length of the header, the header in JSON,
    the data. They have the names, dtypes and lengths of ``expected``."""
    start = 8 + int.from_bytes(mapping[:8], "little")
    try:
        header = json.loads(mapping[8:start])
        views = {}
        for name, entry in header.items():
            (length,) = entry["shape"]
            dtype, (first, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
            if end - first != length * np.dtype(dtype).itemsize:
                raise ValueError(f"{name} has {end - first} bytes")
            views[name] = np.zeros(0, dtype)
            if length:
                views[name] = np.frombuffer(mapping, dtype, length, start + first)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: this shard is corrupt: its header: {error!r}") from None
    found = {name: (array.dtype.type, len(array)) for name, array in views.items()}
    if found != dict(expected):
        raise ValueError(f"{path}: this shard is corrupt: it holds {found}, expected {expected}")
    return views
