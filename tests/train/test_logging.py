"""What a run notes: its lines, what a resumed run keeps of them, and what the trackers get."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastbert.train.logging import LOG, TRACKERS, Log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def noted(folder: Path, tracker: str | None, steps: range, begin: int = 0) -> None:
    log = Log(folder, tracker, settings={"size": "tiny"})
    log.begin(begin)
    for step in steps:
        log.write(step, "train", loss=1.0 / step, accuracy={"mlm": 0.25}, note="words")
    log.write(steps[-1], "validation", validation={"mlm": {"loss": 2.5}}, tokens=7)
    log.close()
    log.close()


def test_lines_and_resuming(tmp_path: Path) -> None:
    """Behind the step that a run goes on from, and what was never finished, goes."""
    noted(tmp_path, None, range(1, 4))
    assert lines(tmp_path)[0] == {
        "step": 1, "kind": "train", "loss": 1.0, "accuracy": {"mlm": 0.25}, "note": "words"
    }  # fmt: skip
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 1, "ki')
    noted(tmp_path, None, range(3, 5), begin=2)
    kinds = [(line["step"], line["kind"]) for line in lines(tmp_path)]
    assert kinds == [(1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "validation")]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path, active=False)
    log.begin(0)
    assert log.write(3, "train", loss=1.0) == {"step": 3, "kind": "train", "loss": 1.0}
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    """Of a run that was resumed each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    noted(tmp_path, "tensorboard", range(1, 4))
    noted(tmp_path, "tensorboard", range(3, 5), begin=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/accuracy/mlm", "validation/mlm/loss", "validation/tokens"
    }  # fmt: skip
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)]
    assert [event.step for event in events.Scalars("validation/mlm/loss")] == [4]


class Run:
    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.finished = given, [], 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its package is called with, by one in its place."""
    runs: list[Run] = []
    wandb: Any = ModuleType("wandb")
    wandb.__spec__ = object()
    wandb.init = lambda **given: runs.append(Run(**given)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    noted(tmp_path, "wandb", range(1, 3))
    noted(tmp_path, "wandb", range(2, 3), begin=1)
    first, second = runs
    assert first.given == second.given
    assert first.given["config"] == {"size": "tiny"} and first.given["resume"] == "allow"
    assert first.given["dir"] == str(tmp_path) and first.given["name"] == tmp_path.name
    assert first.logged[0] == (1, {"train/loss": 1.0, "train/accuracy/mlm": 0.25})
    assert second.logged[-1] == (2, {"validation/mlm/loss": 2.5, "validation/tokens": 7})
    assert first.finished == second.finished == 1
    other = tmp_path / "other"
    other.mkdir()
    noted(other, "wandb", range(1, 2))
    assert runs[-1].given["id"] != first.given["id"]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"^log: {name} .*: pip install {name}$"):
        Log(tmp_path, name)
    with pytest.raises(ValueError, match="^log: got 'aim', expected one of tensorboard, wandb"):
        Log(tmp_path, "aim")


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    log = Log(tmp_path)
    (tmp_path / LOG).symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(OSError, match=r"log\.jsonl: step 3 could not be noted: .*No space left"):
        log.write(3, "train", loss=1.0)
