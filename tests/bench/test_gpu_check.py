"""bench/gpu_check.sh: its budget, and that no stage takes anything from another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from itertools import groupby
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.sh"

# Stands for Python: finds a GPU, fails to build, hangs in the bench of attention.
STUB = f"""#!/bin/bash
case "$*" in
  -c*) echo 90 ;;
  -\\ *) exec {sys.executable} "$@" ;;
  *build_ext*) echo "no compiler" >&2; exit 7 ;;
  *"--op attention --dtype"*) echo begun; exec sleep 60 ;;
  *"--op linear_int8"*) printf '{{}}' > "${{!#}}" ;;
esac
"""


def run(*arguments: object, python: Path | str = sys.executable, script: Path = SCRIPT):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def limits(*options: object, out: Path) -> tuple[dict[str, int], int]:
    """Seconds of each stage, and of the whole: those of a group run side by side."""
    done = run("--dry-run", *options, out)
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^(\w+) +(\d+) s +(\d+|-) ", done.stdout, re.M)
    whole = 0
    for group, members in groupby(stages, key=lambda stage: stage[2]):
        seconds = [int(n) for _, n, _ in members]
        whole += sum(seconds) if group == "-" else max(seconds)
    return {name: int(n) for name, n, _ in stages}, whole


def test_the_budget(tmp_path: Path) -> None:
    """Under 9 minutes for the whole, the sanitizer's 40 seconds included, and less when asked."""
    whole, seconds = limits(out=tmp_path)
    benches = {"attention", "products", "rows", "pretrain", "inference", "training", "waterfall"}
    assert {"build", "doctor", "tests", "native", "curve", *benches} < set(whole)
    assert seconds + 40 * ("memcheck" not in whole) < 540
    for minutes in (1, 4):
        part, seconds = limits("--minutes", minutes, out=tmp_path)
        assert set(part) == set(whole) and seconds < 60 * minutes
    assert limits("--minutes", 30, out=tmp_path)[0] == whole
    assert not list(tmp_path.iterdir())


def test_benches_run_alone(tmp_path: Path) -> None:
    """What is timed has no neighbour; what compiles for it comes before."""
    lines = run("--dry-run", tmp_path).stdout.splitlines()
    timed = [line for line in lines if "--seconds" in line]
    assert timed and all(line.split()[3] == "-" for line in timed)
    assert max(i for i, line in enumerate(lines) if "--warm" in line) < lines.index(timed[0])


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
    assert {path.name for path in out.iterdir()} == {
        "summary.json", "doctor.json", "ops_cuda.json", "everything.tar.gz",
    }  # fmt: skip
    with tarfile.open(out / "everything.tar.gz") as archive:
        texts = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    assert ended["build"]["ended"] == "exit 7"
    assert texts["./build.err"] == b"no compiler\n"
    assert ended["attention"]["ended"] == "cut off"
    assert texts["./attention.out"] == b"begun\n"
    assert ended["plots"]["ended"] == "skipped"
    for name in ("tests", "native", "curve", "rows", "pretrain", "inference", "waterfall"):
        assert ended[name]["ended"] == "passed", ended[name]
    assert "closing table" in done.stdout
