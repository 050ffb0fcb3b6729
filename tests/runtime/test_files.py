"""encode_file: any file, in order, once, also when it is interrupted at any point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.runtime import Encoder, encode_file, files


@pytest.fixture
def encoder(saved: Any) -> Encoder:
    return Encoder(saved()[1])


@pytest.fixture
def lines() -> list[str]:
    return [("the cat sat " * (i % 5) + "ran" * (i % 3)).strip() for i in range(53)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LINES", 10)


def test_a_row_for_every_line(encoder: Encoder, lines: list[str], tmp_path: Path) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    expected = encoder.encode(lines)
    for text in ("\n".join(lines), "\n".join(lines) + "\n", "\r\n".join(lines) + "\r\n"):
        source.write_bytes(text.encode())
        assert encode_file(encoder, source, target) == 53
        assert np.array_equal(np.load(target), expected)
        assert np.load(target, mmap_mode="r").dtype == np.float32
        assert sorted(p.name for p in tmp_path.glob("vectors*")) == ["vectors.npy"]
    assert encode_file(encoder, source, target, pooling="cls", normalize=True) == 53
    assert np.array_equal(np.load(target), encoder.encode(lines, pooling="cls", normalize=True))


def test_an_empty_file_and_long_lines(encoder: Encoder, tmp_path: Path, monkeypatch: Any) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    source.write_bytes(b"")
    assert encode_file(encoder, source, target) == 0
    assert np.load(target).shape == (0, 48)
    monkeypatch.setattr(files, "_LONGEST_LINE", 16)
    source.write_text("the cat sat on é" * 50 + "\nthe cat\n", encoding="utf-8")
    assert encode_file(encoder, source, target) == 2
    assert np.array_equal(np.load(target), encoder.encode(["the cat sat on ", "the cat"]))


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.parametrize("torn", [False, True])
def test_it_goes_on_where_it_was_killed(
    after: int, torn: bool, encoder: Encoder, lines: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed after some blocks, also between the rows and the note of them (torn)."""
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    source.write_text("\n".join(lines), encoding="utf-8")
    calls = []
    note = files._Job.note

    def stop(self: Any, *done: int) -> None:
        calls.append(done)
        if len(calls) == after:
            if not torn:
                note(self, *done)
            raise _Stopped
        note(self, *done)

    with monkeypatch.context() as patch:
        patch.setattr(files._Job, "note", stop)
        with pytest.raises(_Stopped):
            encode_file(encoder, source, target)
    assert not target.exists()
    seen: list[int] = []
    assert encode_file(encoder, source, target, advance=lambda _, rows: seen.append(rows)) == 53
    assert np.array_equal(np.load(target), encoder.encode(lines))
    begun = 10 * (after - torn)
    assert seen == [n for n in (*range(10, 53, 10), 53) if n > begun]
    assert sorted(p.name for p in tmp_path.glob("vectors*")) == ["vectors.npy"]


def _begun(encoder: Encoder, tmp_path: Path, lines: list[str], monkeypatch: Any) -> Any:
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def stop(done: int, rows: int) -> None:
        raise _Stopped

    with pytest.raises(_Stopped):
        encode_file(encoder, source, target, advance=stop)
    return source, target


def test_another_job_is_not_mixed_in(
    encoder: Encoder, lines: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    source, target = _begun(encoder, tmp_path, lines, monkeypatch)
    with pytest.raises(ValueError, match="encoding"):
        encode_file(encoder, source, target, pooling="max")
    source.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="vectors.npy.part.*sha256"):
        encode_file(encoder, source, target)
    assert encode_file(encoder, source, target, restart=True) == 53
    assert np.array_equal(np.load(target), encoder.encode(lines[::-1]))


def test_a_part_that_lost_rows_is_an_error(
    encoder: Encoder, lines: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    source, target = _begun(encoder, tmp_path, lines, monkeypatch)
    part = tmp_path / "vectors.npy.part"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shorter"):
        encode_file(encoder, source, target)
    (tmp_path / "vectors.npy.progress").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        encode_file(encoder, source, target)


def test_bad_files(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.txt: no such file"):
        encode_file(encoder, tmp_path / "nothing.txt", tmp_path / "v.npy")
    source = tmp_path / "texts.txt"
    source.write_bytes(b"the cat\n" * 14 + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="line 15 is not UTF-8"):
        encode_file(encoder, source, tmp_path / "v.npy")
    with pytest.raises(ValueError, match="folder"):
        encode_file(encoder, source, tmp_path / "no" / "v.npy")
