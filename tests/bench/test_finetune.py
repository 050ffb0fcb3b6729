"""Fine-tuning beside its peers: what is made of the runs, and what the README says of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return _module("finetune")


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


# runner and seed -> seconds, score
RUNS = {
    ("fastbert", 0): (10.0, 0.90), ("fastbert", 1): (20.0, 0.80), ("fastbert", 2): (10.0, 0.85),
    ("trainer", 0): (30.0, 0.88), ("trainer", 1): (40.0, 0.88), ("trainer", 2): (25.0, 0.91),
}  # fmt: skip


def measured(
    finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: bool
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The row made of RUNS, and in which order these were asked for."""
    order = []

    def found(job: dict[str, Any]) -> dict[str, Any]:
        key = job["runner"], job["setting"]["seed"]
        order.append(key)
        seconds, score = RUNS[key]
        return {"seconds": seconds, "tokens": 600, "updates": 6, "score": score}

    monkeypatch.setattr(finetune, "in_a_process", found)
    monkeypatch.setattr("fastbert.finetune.run.settled", lambda *_, setting, **__: setting)
    path = tmp_path / "rows.csv"
    data = finetune.LabelledSet("some", "classify", path, path, path, "accuracy", 0.8, 3)
    runners = ["fastbert", "trainer"]
    return finetune.measure(tmp_path, data, runners, 3, None, timed), order


def test_a_row_is_of_pairs_of_runs(
    finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row, order = measured(finetune, monkeypatch, tmp_path, timed=True)
    assert order == [("fastbert", 0), ("trainer", 0), ("trainer", 1), ("fastbert", 1),
                     ("fastbert", 2), ("trainer", 2)]  # fmt: skip
    assert row["fastbert"]["mean"] == pytest.approx(0.85)
    assert row["fastbert"]["sd"] == pytest.approx(0.05)
    assert row["fastbert"]["seconds"] == 10.0 and row["fastbert"]["tokens_per_s"] == 60.0
    # Of 3.0, 2.0 and 2.5: each seed's runs are compared with each other.
    assert row["trainer"]["speedup"] == 2.5
    assert row["setting"]["epochs"] == 3 and row["bar"] == 0.8


def test_an_untimed_row_has_no_seconds(
    finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row, _ = measured(finetune, monkeypatch, tmp_path, timed=False)
    assert "seconds" not in row["fastbert"] and "speedup" not in row["trainer"]
    assert all("seconds" not in run for runs in row["runs"].values() for run in runs)


def test_the_readme_names_the_machine_of_each_row(tmp_path: Path) -> None:
    def row(name: str, machine: str) -> dict[str, Any]:
        run = {"score": 0.9, "int8_loss": 0.001, "seconds": 3.0}
        summary = {"mean": 0.9, "sd": None, "seconds": 3.0, "tokens_per_s": 50.0}
        return {"set": name, "score": "accuracy", "bar": None, "machine": machine,
                "fastbert": summary, "runs": {"fastbert": [run]}}  # fmt: skip

    training, report = _module("report_training"), _module("report")
    path = tmp_path / "finetune_cpu.json"
    rows = [row("a", "Zen"), row("b", "Xeon"), row("c", "Zen")]
    path.write_text(json.dumps({"model": "some", "rows": rows}))
    text = training.finetune(path, report.table, lambda row: f"{row['machine']}.")
    assert text.splitlines()[-1] == "some; a, c: Zen. b: Xeon."
    assert "| a | accuracy | – | 90.00 | – | 3 | 50 | – | 0.10 | 1 |" in text
    path.write_text(json.dumps({"model": "some", "rows": rows[:1]}))
    text = training.finetune(path, report.table, lambda row: f"{row['machine']}.")
    assert text.splitlines()[-1] == "some; Zen."
