"""``fastbert quantize`` and ``fastbert encode`` from folder to file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.cli import main
from fastbert.runtime import Encoder

_MAIN = "from fastbert.cli import main; main()"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A tiny BERT in a folder as old checkpoints have it: a vocab.txt and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(WORDS), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=80, max_position_embeddings=24,
    )  # fmt: skip
    fastbert.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def quantised(model: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "model"
    fastbert.quantize(fastbert.BertModel.from_pretrained(model)).save_pretrained(out)
    return out


def run(capsys: Any, monkeypatch: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_quantize_writes_what_the_runtime_reads(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out, texts = tmp_path / "out", tmp_path / "texts.txt"
    texts.write_text("the cat sat\non the mat\n\nthe cat\n", encoding="utf-8")
    code, stdout, _ = run(
        capsys, monkeypatch, "quantize", "--model", model, "--out", out, "--scheme", "int8-static",
        "--calibration", texts, "--calibrate", "max", "--keep-float", "layers.1", "--json",
    )  # fmt: skip
    report = json.loads(stdout)
    assert code == 0 and report["scheme"] == "int8-static" and report["out"] == str(out)
    assert len(report["integer"]) == 4 and len(report["floating"]) == 4
    encoder = Encoder(out)
    assert [i.tolist() for i in encoder.tokenize(["The cat"]).ids] == [[2, 5, 6, 3]]
    assert encoder.encode(["the cat"]).shape == (1, 48)
    code, stdout, _ = run(capsys, monkeypatch, "quantize", "--model", model, "--out", out)
    assert code == 0 and "8 Linears in int8" in stdout


def test_encode(quantised: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    texts.write_text("the cat sat\n\non the mat", encoding="utf-8")
    arguments = ("encode", "--model", quantised, "--input", texts, "--output", out)
    code, stdout, _ = run(capsys, monkeypatch, *arguments, "--json", "--threads", "1")
    report = json.loads(stdout)
    assert code == 0 and (report["rows"], report["width"]) == (3, 48)
    expected = Encoder(quantised).encode(["the cat sat", "", "on the mat"])
    assert np.array_equal(np.load(out), expected)
    code, stdout, _ = run(capsys, monkeypatch, *arguments, "--pooling", "cls")
    assert code == 0 and "3 vectors" in stdout
    assert not np.array_equal(np.load(out), expected)


def test_bad_input_is_exit_code_2(
    model: Path, quantised: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    texts.write_bytes(b"the cat\n\xff\n")
    good = tmp_path / "good.txt"
    good.write_text("the cat\n", encoding="utf-8")
    nothing = tmp_path / "nothing"
    quantize = ("quantize", "--model", model, "--out", tmp_path / "out")
    encode = ("encode", "--input", texts, "--output", out)
    for arguments, message in (
        ((*quantize, "--scheme", "int4"), "scheme"),
        ((*quantize, "--scheme", "int8-static"), "calibration"),
        ((*quantize, "--calibration", nothing), str(nothing)),
        ((*quantize, "--keep-float", "layers.9"), "layers.9"),
        (("quantize", "--model", nothing, "--out", out), str(nothing)),
        (("quantize", "--model", model), "--out"),
        ((*encode, "--model", model), "fastbert.json"),
        ((*encode, "--model", quantised), "line 2 is not UTF-8"),
        ((*encode, "--model", quantised, "--input", good, "--pooling", "sum"), "pooling"),
        ((*encode, "--model", quantised, "--threads", "0"), "--threads"),
        (("encode", "--model", quantised, "--input", nothing, "--output", out), str(nothing)),
    ):
        code, _, stderr = run(capsys, monkeypatch, *arguments)
        text = "".join(stderr.split())  # boxes of the command line break lines anywhere
        assert code == 2 and "".join(message.split()) in text, (arguments, stderr)
        assert "Traceback" not in stderr and not out.exists()


def test_help_says_what_it_is_for(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for command, word in (("quantize", "int8-static"), ("encode", "vector for every line")):
        code, stdout, _ = run(capsys, monkeypatch, command, "--help")
        assert code == 0 and word in stdout and "--json" in stdout


def test_a_killed_run_goes_on(quantised: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process; the second run is not asked to begin anew."""
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    lines = [" ".join(WORDS[5 + (i * k) % 5] for k in range(1, 12)) for i in range(60_000)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-c", _MAIN, "encode", "--model", str(quantised),
               "--input", str(texts), "--output", str(out), "--threads", "1"]  # fmt: skip
    progress = Path(f"{out}.progress")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not progress.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "the run was over before it could be killed"
    done = json.loads(progress.read_text())["rows"]
    assert 0 < done < len(lines)
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["rows"] == len(lines)
    vectors = np.load(out, mmap_mode="r")
    encoder = Encoder(quantised)
    for place in (0, done - 1, done, len(lines) - 1):
        assert np.array_equal(vectors[place], encoder.encode([lines[place]])[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]
