"""bench/gpu_check.sh: its budget, and that no stage takes anything from another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.sh"

# Stands for Python: finds a GPU, fails to build, hangs in the optimisers' bench.
STUB = f"""#!/bin/sh
case "$*" in
  -c*) echo 90 ;;
  -\\ *) exec {sys.executable} "$@" ;;
  *build_ext*) echo "no compiler" >&2; exit 7 ;;
  *ops_optimizers_cuda.json*) echo begun; exec sleep 60 ;;
esac
"""


def run(*arguments: object, python: Path | str = sys.executable, script: Path = SCRIPT):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def limits(*options: object, out: Path) -> dict[str, int]:
    done = run("--dry-run", *options, out)
    assert done.returncode == 0, done.stderr
    return {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+) s ", done.stdout, re.M)}


def test_the_budget(tmp_path: Path) -> None:
    """Under 9 minutes for the whole, the sanitizer's 40 seconds included, and less when asked."""
    whole = limits(out=tmp_path)
    benches = {"attention", "products", "rows", "optimizers", "pretrain", "inference", "waterfall"}
    assert {"build", "doctor", "tests", *benches} < set(whole)
    assert sum(whole.values()) + 40 * ("memcheck" not in whole) < 540
    for minutes in (1, 4):
        part = limits("--minutes", minutes, out=tmp_path)
        assert set(part) == set(whole) and sum(part.values()) < 60 * minutes
    assert limits("--minutes", 30, out=tmp_path) == whole
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "arguments", [[], ["--minutes", "x", "out"], ["--fast", "out"], ["a", "b"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 3
    assert "no GPU to check" in done.stderr and "--dry-run" in done.stderr


def test_stages_stand_alone(tmp_path: Path) -> None:
    """One fails, one hangs; the others run, and everyone's output and end is there."""
    for folder in ("bench", "fastbert", "kernels"):
        (tmp_path / folder).mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "bench"))
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "out"
    done = run("--minutes", 2, out, python=stub, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    ended = {s["stage"]: s for s in json.loads((out / "summary.json").read_text())["stages"]}
    assert ended["build"]["ended"] == "exit 7"
    assert (out / "build.err").read_text() == "no compiler\n"
    assert ended["optimizers"]["ended"] == "cut off"
    assert (out / "optimizers.out").read_text() == "begun\n"
    assert ended["plots"]["ended"] == "skipped"
    for name in ("tests", "attention", "rows", "pretrain", "inference", "waterfall"):
        assert ended[name]["ended"] == "passed", ended[name]
    assert "closing table" in done.stdout
