"""The table of methods: what is added up, and that nothing is run or counted twice."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("methods")
    finally:
        sys.path.remove(str(BENCH))


def row(method: str, seed: int, score: float) -> dict:
    return {
        "set": "some:500",
        "method": method,
        "seed": seed,
        "score_name": "accuracy",
        "score": score,
    }


def test_differences_are_of_the_same_seeds(methods: ModuleType) -> None:
    runs = [row("plain", 0, 0.90), row("plain", 1, 0.80), row("mixout", 1, 0.83),
            row("mixout", 2, 0.95)]  # fmt: skip
    plain, mixout = methods.summary(runs, {"mixout": 1.9})
    assert (plain["mean"], plain["seeds"], plain["cost"]) == (pytest.approx(0.85), 2, None)
    assert plain["sd"] == pytest.approx(0.05 * 2**0.5) and plain["difference"] == 0.0
    # Seed 2 has no plain run to be compared with.
    assert mixout["mean"] == pytest.approx(0.89) and mixout["difference"] == pytest.approx(0.03)
    assert mixout["cost"] == 1.9


def test_files_are_joined(methods: ModuleType, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    first = {"machine": "here", "runs": [row("plain", 0, 0.9)], "costs": {"plain": 1.0}}
    second = [row("plain", 0, 0.1), row("smart", 0, 0.8)]
    one.write_text(json.dumps(first))
    two.write_text(json.dumps({"machine": "there", "runs": second, "costs": {"smart": 3.0}}))
    results = methods.Results(one, Path("models/some"))
    results.add(two)
    results.write()
    written = json.loads(one.read_text())
    assert [run["score"] for run in written["runs"]] == [0.9, 0.8]
    assert [r["cost"] for r in written["rows"]] == [1.0, 3.0]
    assert written["machine"] == "here"
    assert written["rows"][1]["difference"] == pytest.approx(-0.1)


def test_fewer_rows_have_every_label(methods: ModuleType, tmp_path: Path) -> None:
    """A label that none of the rows drawn has comes with its first row."""
    rare = [[f"{place} {i}", f"rare {i}"] for i in range(30) for place in ("first", "second")]
    rows = [[f"text {i}", "common"] for i in range(100)] + rare
    data = methods.finetune_data
    path = data._write_csv(tmp_path / "train.csv", ["text", "label"], rows)
    whole = data.LabelledSet("some", "classify", path, path, path, "accuracy", 0.9, 3)
    few = data._fewer(whole, 20)
    header, *chosen = (line.split(",") for line in few.train.read_text().splitlines())
    assert (few.name, few.bar, header) == ("some:20", None, ["text", "label"])
    drawn, added = chosen[:20], chosen[20:]
    assert {label for _, label in chosen} == {label for _, label in rows}
    assert not {label for _, label in drawn} & {label for _, label in added}
    assert len(added) > 10 and all(text.startswith("first") for text, _ in added)
