"""The file of a saved model's tensors: the safetensors format, mapped and checked.

8 bytes little-endian: length of the header; the header, JSON: name -> dtype, shape, data_offsets
(first and last byte, counted from the end of the header); the data, without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

Array = np.ndarray

# Name of a dtype in the format -> numpy's. bf16, which numpy has not, is its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_LONGEST_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """One tensor as fastbert.json records it; crc32 is of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int


def describe(arrays: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """What fastbert.json records of each array."""
    return {
        name: {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "crc32": zlib.crc32(x.data)}
        for name, x in arrays.items()
    }


def entries(recorded: Any) -> dict[str, Entry]:
    """The record of fastbert.json, checked. Raises ValueError, saying what was expected."""
    if not isinstance(recorded, dict):
        raise ValueError("tensors: expected an object")
    found = {}
    for name, value in recorded.items():
        fields = value if isinstance(value, dict) else {}
        dtype, shape, crc32 = (fields.get(key) for key in Entry._fields)
        shape = shape if isinstance(shape, list) else ["?"]
        sizes = all(type(n) is int and n >= 0 for n in shape)
        if dtype not in DTYPES or not sizes or type(crc32) is not int:
            raise ValueError(
                f"tensors: got {name}: {value}, expected dtype ({', '.join(DTYPES)}), shape, crc32"
            )
        found[name] = Entry(dtype, tuple(shape), crc32)
    return found


def _order(item: tuple[str, Array]) -> tuple[int, bool, str]:
    """Wide types first, so that all are aligned; embeddings before what is packed and let go."""
    name, x = item
    return -x.itemsize, not name.startswith("embeddings."), name


def write(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Write C-contiguous arrays of the three dtypes."""
    header: dict[str, Any] = {"__metadata__": {"format": "fastbert"}}
    ordered = sorted(arrays.items(), key=_order)
    end = 0
    for name, x in ordered:
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, x in ordered:
        file.write(x.data)


class MappedTensors:
    """The tensors of a file, as read-only views of its mapping.

    Every entry of ``expected`` has to be there as recorded, down to the bytes, and no other.
    Raises ValueError that names the file, what is wrong, and what was expected.
    """

    def __init__(self, path: Path, expected: Mapping[str, Entry]) -> None:
        self.path = path
        with path.open("rb") as file:
            size = path.stat().st_size
            self._data_start = _header_end(path, file, size)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _header(path, self._map[8 : self._data_start])
        self._ends: dict[str, int] = {}
        self.arrays: dict[str, Array] = {}
        _same_names(path, header, expected)
        spans = sorted((_span(path, n, header[n], e), n) for n, e in expected.items())
        position = 0
        for (start, end), name in spans:
            if start != position:
                raise ValueError(f"{path}: {name} starts at byte {start}, expected {position}")
            position = end
        if position != size - self._data_start:
            raise ValueError(
                f"{path}: holds {size - self._data_start} bytes of tensors, expected {position}"
            )
        for (start, end), name in spans:
            entry, first = expected[name], self._data_start + start
            flat = np.empty(0, DTYPES[entry.dtype])
            if end > start:
                flat = np.frombuffer(self._map, flat.dtype, math.prod(entry.shape), first)
            self.arrays[name] = flat.reshape(entry.shape)
            self._ends[name] = self._data_start + end
        self._check_bytes(expected)

    def _check_bytes(self, expected: Mapping[str, Entry]) -> None:
        for name, x in self.arrays.items():
            found, wanted = zlib.crc32(x.data), expected[name].crc32
            if found != wanted:
                raise ValueError(
                    f"{self.path}: the bytes of {name} are not those that were saved: CRC-32 "
                    f"{found:08x}, expected {wanted:08x}"
                )

    def release_after(self, kept: str) -> None:
        """Let go of the memory of all tensors behind those whose names start with ``kept``.

        They are read from the file again if they are used again.
        """
        last = max((end for n, end in self._ends.items() if n.startswith(kept)), default=0)
        start = last + (-last % mmap.PAGESIZE)
        if hasattr(mmap, "MADV_DONTNEED") and start < len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED, start, len(self._map) - start)


def _header_end(path: Path, file: BinaryIO, size: int) -> int:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{path}: cut short or no safetensors file: {size} bytes, expected a header of {length}"
        )
    return 8 + length


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    return header


def _same_names(path: Path, header: Mapping[str, Any], expected: Mapping[str, Entry]) -> None:
    missing, extra = sorted(expected.keys() - header), sorted(header.keys() - expected.keys())
    if missing or extra:
        what = [f"lacks {', '.join(missing[:4])}"] * bool(missing)
        what += [f"holds {', '.join(extra[:4])}, which fastbert.json does not name"] * bool(extra)
        raise ValueError(f"{path}: {'; '.join(what)}")


def _span(path: Path, name: str, value: Any, entry: Entry) -> tuple[int, int]:
    """First and last byte of a tensor, whose dtype, shape and size are the recorded ones."""
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    given = (fields.get("dtype"), fields.get("shape"))
    wanted = (entry.dtype, list(entry.shape))
    if given != wanted:
        raise ValueError(
            f"{path}: {name} is {given[0]} {given[1]}, expected {wanted[0]} {wanted[1]}"
        )
    size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    offsets: Any = fields.get("data_offsets")
    whole = isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]
    if not whole or offsets[0] < 0 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{path}: {name} has data_offsets {offsets}, expected {size} bytes")
    return offsets[0], offsets[1]
