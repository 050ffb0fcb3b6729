"""``fastbert finetune``, ``evaluate``, ``predict``, and ``quantize`` of what was fine-tuned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.finetune import METHODS, TASKS

Paths = tuple[Path, Path]
_QUICK = ("--epochs", "2", "--batch", "8", "--lr", "3e-3", "--early-stop", "0")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from fastbert.cli import main; main()", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, timeout=600,
    )  # fmt: skip


def succeed(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tuned(
    checkpoint: Path, reviews: Paths, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """(folder of a run, what it printed)"""
    out = tmp_path_factory.mktemp("tuned") / "out"
    train, dev = reviews
    printed = succeed(
        "finetune", "--model", checkpoint, "--task", "classify", "--train", train, "--dev", dev,
        "--test", dev, "--out", out, "--method", "layerwise-lr:.9", "--epochs", 8, "--batch", 8,
        "--lr", "3e-3",
    )  # fmt: skip
    return out, printed


def test_from_a_checkpoint_to_int8(tuned: tuple[Path, str], reviews: Paths, tmp_path: Path) -> None:
    """Each command reads what the one before it left."""
    out, printed = tuned
    dev = reviews[1]
    assert printed.splitlines()[-1] == str(out / "model")
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "layerwise-lr"
    expected = results["test"]["accuracy"]["value"]
    assert expected >= 0.95 and f"{expected:.4f}" in printed
    found = json.loads(succeed("evaluate", "--model", out / "model", "--data", dev, "--json"))
    assert found["scores"]["accuracy"] == results["test"]["accuracy"]

    int8 = tmp_path / "int8"
    report = json.loads(
        succeed("quantize", "--model", out / "model", "--out", int8, "--evaluate", dev, "--json")
    )
    assert report["score_before"] == pytest.approx(100 * expected)
    assert report["score_after"] >= report["score_before"] - 0.5
    plots = tmp_path / "plots"
    text = succeed("evaluate", "--model", int8, "--data", dev, "--plots", plots)
    assert f"{report['score_after'] / 100:.4f}" in text
    assert sorted(path.name for path in plots.iterdir()) == ["calibration.png", "confusion.png"]

    unlabelled = tmp_path / "texts.jsonl"
    unlabelled.write_text('{"text": "the film was good"}\n{"text": "a bad cat"}\n')
    succeed("predict", "--model", int8, "--data", unlabelled, "--out", tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [(row["line"], row["label"]) for row in said] == [(1, "praise"), (2, "blame")]


def test_two_tasks_one_behind_the_other(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    scores = tmp_path / "scores.jsonl"
    lines = [{"text": "good film", "label": 4.5}, {"text": "bad film", "label": 1.5}] * 10
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    printed = succeed(
        "finetune", "--model", checkpoint, "--task", "classify", "--train", train, "--dev", dev,
        "--then", scores, "--then-task", "regress", "--out", out, *_QUICK, "--json",
    )  # fmt: skip
    results = json.loads(printed)
    assert results["task"] == "regress" and set(results["dev"]) == {"pearson", "spearman", "mse"}
    assert json.loads((out / "first" / "results.json").read_text())["task"] == "classify"
    begun = json.loads((out / "run.json").read_text())
    assert begun["model"] == str((out / "first" / "model").resolve()) and begun["new_head"]


def test_two_tasks_with_columns_of_their_own(
    checkpoint: Path, reviews: Paths, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.jsonl"
    lines = [{"a": "good film", "b": "x y", "c": 4.5}, {"a": "bad film", "b": "y x", "c": 1.5}] * 10
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    arguments = ("finetune", "--model", checkpoint, "--task", "classify", "--train", reviews[0],
                 "--then", scores, "--then-task", "regress", "--out", out, *_QUICK)  # fmt: skip
    refused = run(*arguments, "--method", "scalar-mix")
    assert (
        refused.returncode == 2 and "--method: scalar-mix leaves the model parts" in refused.stderr
    )
    assert not out.exists()
    succeed(*arguments, "--then-column", "text=a", "--then-column", "label=c")
    assert json.loads((out / "run.json").read_text())["columns"] == {"text": "a", "label": "c"}


def test_what_is_cut_is_counted(tuned: tuple[Path, str], tmp_path: Path) -> None:
    """A text of more tokens than the model has positions goes through it in windows."""
    rows = tmp_path / "rows.jsonl"
    texts = ["the film was good " * 20, "a bad film"]
    rows.write_text("".join(json.dumps({"text": x, "label": "praise"}) + "\n" for x in texts))
    model = tuned[0] / "model"
    found = json.loads(succeed("evaluate", "--model", model, "--data", rows, "--json"))
    assert (found["rows"], found["windowed"], found["truncated"]) == (2, 1, 0)
    done = run("predict", "--model", model, "--data", rows, "--out", tmp_path / "said.jsonl")
    assert "2 rows, 1 in windows" in done.stderr


def test_options_reach_the_setting(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("finetune", "--model", checkpoint, "--task", "classify", "--train", reviews[0],
            "--out", out, *_QUICK, "--no-bias-correction", "--patience", 3, "--weight-decay", 0.1,
            "--warmup", 0.2)  # fmt: skip
    used = json.loads((out / "run.json").read_text())["setting"]
    assert (used["bias_correction"], used["patience"], used["weight_decay"], used["warmup"]) == (
        False, 3, 0.1, 0.2,
    )  # fmt: skip


def test_search_takes_the_best_rate(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    out = tmp_path / "out"
    command = (
        "finetune", "--model", checkpoint, "--task", "classify", "--train", train, "--dev", dev,
        "--out", out, *_QUICK[:4], "--search", "learning-rate=1e-9/3e-3", "--json",
    )  # fmt: skip
    results = json.loads(succeed(*command, "--epochs", 6))
    tried = json.loads((out / "search.json").read_text())
    assert [row["setting"]["learning_rate"] for row in tried] == [1e-9, 3e-3]
    best = max(tried, key=lambda row: row["score"])
    assert results["setting"]["learning_rate"] == best["setting"]["learning_rate"] == 3e-3
    done = run(*command, "--epochs", 6)
    assert done.returncode == 2 and "holds a search already" in done.stderr
    # Nothing is done twice.
    before = (out / "search.json").stat().st_mtime_ns
    assert json.loads(succeed(*command, "--epochs", 6, "--resume")) == results
    assert (out / "search.json").stat().st_mtime_ns == before


def test_list_names_everything() -> None:
    printed = succeed("finetune", "--list")
    for name, task in TASKS.items():
        assert f" {name} " in printed and task.summary in printed
    for name, method in METHODS.items():
        assert f" {name} " in printed and method.paper in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "classify"), "--model, --train, --out: missing"),
        (("--column", "text"), "--column: got 'text', expected role=column"),
        (("--search", "sing"), "search: got 'sing'"),
        (("--search", "epochs=0"), "epochs: got 0, expected more than 0"),
        (("--method", "freelb:steps=none"), "freelb: steps: got None"),
        (("--dev", "nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, reviews: Paths, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    common = ("--model", checkpoint, "--task", "classify", "--train", reviews[0],
              "--out", tmp_path / "out")  # fmt: skip
    done = run("finetune", *(() if "missing" in message else common), *arguments)
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("fastbert: ")]
    assert message in line
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_model_that_was_trained_elsewhere_needs_a_task(checkpoint: Path, reviews: Paths) -> None:
    done = run("evaluate", "--model", checkpoint, "--data", reviews[1])
    assert done.returncode == 2 and "holds no task.json" in done.stderr
