"""``fastbert pretrain``: what it lists, shows and refuses. (A run: tests/pretrain/test_run.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.pretrain import OBJECTIVES, PRESETS, SOURCES, Options, preset


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain", *arguments],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, timeout=300,
    )  # fmt: skip


def test_list_names_everything_with_its_paper() -> None:
    done = run("--list")
    assert done.returncode == 0, done.stderr
    for table in (OBJECTIVES, SOURCES, PRESETS):
        for name, entry in table.items():
            assert f" {name} " in done.stdout and entry.paper in done.stdout


def test_show_prints_the_options_that_would_run() -> None:
    changes = (
        "--size",
        "mini",
        "--rate",
        "0.4",
        "--mask",
        "word",
        "--length",
        "64",
        "--lr",
        "3e-4",
    )
    done = run("--preset", "roberta", *changes, "--show")
    assert done.returncode == 0, done.stderr
    shown = Options.from_json(done.stdout)
    expected = preset("roberta", size="mini", rate=0.4, what="word", learning_rate=3e-4)
    assert shown.masking == expected.masking and shown.learning_rate == 3e-4
    assert shown.size == "mini" and [phase.length for phase in shown.phases] == [64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "bart-base"), "preset: got 'bart-base', expected one of minutes"),
        (("--objective", "mlm+nap"), "objective: got 'nap', expected some of mlm"),
        (("--out", "somewhere"), "--corpus: missing, expected a folder"),
        (("--stack", "3,x"), "--stack: got '3,x', expected numbers"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    extra = () if "--out" in arguments else ("--out", str(tmp_path / "run"))
    corpus = () if "missing" in message else ("--corpus", str(tmp_path))
    done = run(*arguments, *extra, *corpus)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr
