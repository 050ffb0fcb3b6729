"""The command line: help for a newcomer, JSON for machines, exit code 2 on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_MAIN = "from fastbert.cli import main; main()"


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_help_says_what_a_command_is_for(command: str) -> None:
    done = _run(command, "--help", COLUMNS="120")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "Hugging Face" in done.stdout or "kernel" in done.stdout


def test_no_command_prints_help_and_fails() -> None:
    done = _run()
    assert done.returncode == 2
    assert "doctor" in done.stdout + done.stderr


def test_doctor_json_names_a_backend_for_every_op() -> None:
    from fastbert.ops import OPS

    done = _run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"versions", "cpu", "native", "gpu", "settings", "ops"} <= set(report)
    for case in report["ops"]:
        assert [row["op"] for row in case["choices"]] == list(OPS)
        assert all(row["backend"] for row in case["choices"])


def test_doctor_shows_a_forced_backend_and_why_another_was_passed_over() -> None:
    done = _run("doctor", "--json", FASTBERT_BACKEND="reference")
    report = json.loads(done.stdout)
    assert report["settings"] == {"FASTBERT_BACKEND": "reference"}
    rows = [row for case in report["ops"] for row in case["choices"]]
    assert {row["backend"] for row in rows} == {"reference"}
    assert all("triton" in row["passed_over"] for row in rows)


def test_doctor_text_fits_a_reader() -> None:
    done = _run("doctor", COLUMNS="110")
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout and "cpu kernels" in done.stdout


@pytest.mark.parametrize("name", ["FASTBERT_BACKEND", "FASTBERT_CPU_ISA"])
def test_a_bad_setting_is_exit_code_2_and_names_the_variable(name: str) -> None:
    done = _run("doctor", **{name: "abacus"})
    assert done.returncode == 2
    assert name in done.stderr and "abacus" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_option_is_exit_code_2() -> None:
    done = _run("demo", "--texts", "three")
    assert done.returncode == 2
    assert "--texts" in done.stderr and "integer" in done.stderr


def test_demo_measures_checks_and_writes(tmp_path) -> None:
    done = _run("demo", "--texts", "24", "--repeats", "1", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "demo.json").read_text()) == report
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert report["parity"]["ok"], report["parity"]["text"]
    for pair in report["known_cosines"]:
        assert pair["cosine"] == pytest.approx(pair["published"], abs=1e-4)
    ours = [row for row in report["rows"] if row["model"] == "fastbert"]
    assert ours and all(row["min_cosine"] > 0.999 for row in ours)
    exact = [row for row in ours if row["dtype"] == "float32"]
    assert exact and all(row["min_cosine"] > 0.999999 for row in exact)
