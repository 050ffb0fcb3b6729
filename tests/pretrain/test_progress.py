"""What a run tells while it goes: the line of numbers, the log, the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli.pretrain_shown import progress_line, start_line
from fastbert.data import Corpus
from fastbert.pretrain import Options, Phase, Setting, Trainer, preset, pretrain

SMALL = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    chosen = preset("minutes", size=str(tmp_path / "config.json"), objective="rtd")
    return dataclasses.replace(chosen, phases=(Phase(32, 100, 16),), warmup_steps=5)


def test_line() -> None:
    noted = {
        "step": 1230, "kind": "train", "lr": 1e-3, "loss": 40.0, "rtd/generator": 5.021, "rtd": 0.5,
        "accuracy": {"rtd/generator": 0.184}, "tokens_per_s": 41870.2, "mfu": 0.6123,
        "seconds": 9.0, "tokens": 99,
    }  # fmt: skip
    assert progress_line(noted, 185.4) == (
        "step 1,230 rtd/generator 5.021 (right 18.4%) rtd 0.500 41,870 tok/s MFU 61.2% ETA 3:05"
    )
    assert progress_line(noted, 3600 * 26 + 61).endswith("ETA 26:01:01")
    begun = {"step": 0, "layers": 2, "hidden_size": 128, "parameters": 4_385_920,
             "update_tokens": 4_096}  # fmt: skip
    assert start_line(begun) == (
        "step 0: 2 layers of 128, 4,385,920 parameters, 4,096 tokens an update"
    )


def test_every_look_has_what_the_line_shows(
    documentation: Corpus, options: Options, tmp_path: Path
) -> None:
    """Loss and accuracy of each summand; rates of the steps since the last look; time left."""
    left: list[float] = []

    def tell(trainer: Trainer, noted: dict[str, Any]) -> None:
        if noted["kind"] == "start":
            assert "1 layers of 32" in start_line(noted)
            return
        left.append(trainer.course.seconds_left)
        progress_line(noted, left[-1])

    chosen = Setting(steps=6, batch_tokens=256, workers=0, log_every=2)
    pretrain(documentation.folder, tmp_path / "run", options, chosen, tell=tell)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    before = {"seconds": 0.0, "tokens": 0}
    for row in rows:
        names = {"rtd", "rtd/generator"}
        assert row.keys() >= names and row["accuracy"].keys() == names
        assert 0.0 <= row["accuracy"]["rtd/generator"] < 0.5 < row["accuracy"]["rtd"] <= 1.0
        seconds = row["seconds"] - before["seconds"]
        rate = (row["tokens"] - before["tokens"]) / seconds
        # Written to a tenth of a token, and a thousandth of a second at either end.
        assert row["tokens_per_s"] == pytest.approx(rate, rel=0.001 / seconds, abs=0.05)
        assert 0.0 < row["mfu"] < 1.0
        before = row
    assert left[0] == pytest.approx(2 * rows[0]["seconds"], rel=0.01) and left[-1] == 0.0


def test_nothing_is_known_before_the_first_step(
    documentation: Corpus, options: Options, tmp_path: Path
) -> None:
    from fastbert.train.processes import accelerator

    trainer = Trainer(documentation.folder, options, Setting(steps=6), tmp_path, accelerator("no"))
    assert math.isinf(trainer.course.seconds_left)


def test_tensorboard(documentation: Corpus, options: Options, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    chosen = Setting(steps=4, batch_tokens=256, workers=0, log_every=1, tracker="tensorboard")
    pretrain(documentation.folder, out, options, chosen)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "rtd/generator", "lr", "mfu"):
        found = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in rows]
    assert len(events.Scalars("train/accuracy/rtd")) == 4


def test_a_tracker_that_is_not_installed_is_missed_at_once(
    documentation: Corpus, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        pretrain(documentation.folder, tmp_path / "run", options, Setting(steps=1, tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_looking_changes_nothing(documentation: Corpus, options: Options, tmp_path: Path) -> None:
    """Measuring at every step draws no random number and leaves every loss as it is."""
    found = []
    for every in (1, 4):
        out = tmp_path / str(every)
        pretrain(documentation.folder, out, options,
                 Setting(steps=4, batch_tokens=256, workers=0, log_every=every))  # fmt: skip
        found.append(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["loss"])
    assert found[0] == found[1]
