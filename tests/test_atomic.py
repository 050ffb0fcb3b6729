"""replacing: all targets as they were, or all of them new, and nothing else in the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastbert import atomic
from fastbert.atomic import replacing

OLD = {"a": b"old a\r\n\x00", "b": b"old b"}


@pytest.fixture
def targets(tmp_path: Path) -> tuple[Path, Path]:
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path / "a", tmp_path / "b"


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in ``folder``, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_new_files_take_the_places_of_old_ones_and_of_none(
    targets: tuple[Path, Path], tmp_path: Path
) -> None:
    a, _ = targets
    with replacing(a, tmp_path / "c") as (new_a, new_c):
        new_a.write_bytes(b"new a")
        new_c.write_bytes(b"new c")
        assert new_a.parent == new_c.parent == tmp_path
        assert a.read_bytes() == OLD["a"] and not (tmp_path / "c").exists()
    assert contents(tmp_path) == {"a": b"new a", "b": OLD["b"], "c": b"new c"}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_while_writing_keeps_the_old_file(
    kind: type[BaseException], targets: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(kind, match="stopped"), replacing(targets[0]) as (new,):
        new.write_bytes(b"half of it")
        raise kind("stopped")
    assert contents(tmp_path) == OLD


def test_a_failure_in_the_second_of_two_keeps_both(
    targets: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="full"), replacing(*targets) as (first, second):
        first.write_bytes(b"all of it")
        second.write_bytes(b"half")
        raise OSError("disk full")
    assert contents(tmp_path) == OLD


def test_a_target_that_was_not_written_keeps_both(
    targets: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError), replacing(*targets) as (first, _):
        first.write_bytes(b"all of it")
    assert contents(tmp_path) == OLD


def test_nothing_is_renamed_before_everything_is_on_the_disk(
    targets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files, then the renames, then the folder; a disk that fails on the second keeps both."""
    happened: list[str] = []
    sync, replace = atomic.sync, os.replace

    def synced(path: Path) -> None:
        happened.append(f"sync {path.relative_to(tmp_path.parent).as_posix()}")
        sync(path)

    def renamed(source: Path, target: Path) -> None:
        happened.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(atomic, "sync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing(*targets) as new:
        for path in new:
            path.write_bytes(b"new")
    files = [f"sync {tmp_path.name}/{path.name}" for path in new]
    assert happened == [*files, "rename a", "rename b", f"sync {tmp_path.name}"]
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}

    def full(path: Path) -> None:
        if path == second:
            raise OSError("disk full")

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(OSError, match="full"), replacing(*targets) as (first, second):
        first.write_bytes(b"newer")
        second.write_bytes(b"newer")
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}


def test_a_folder_is_refused_before_anything_is_written(
    targets: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        pytest.raises(IsADirectoryError, match=r"folder: is a folder"),
        replacing(targets[0], folder),
    ):
        pytest.fail("the block was entered")
    folder.rmdir()
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as (new,):
            new.write_bytes(b"a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
