"""``fastbert prepare`` from text to a corpus folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.data import Corpus

TEXT = "The cat sat. The dog sat.\nOn the mat.\n\nA second document. It is short.\n\nThird.\n"


def run(capsys: Any, monkeypatch: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, path in enumerate(paths):
        path.write_text(TEXT.replace("Third", f"Third of {number}"), encoding="utf-8")
    return paths


def test_it_prints_what_it_found(
    texts: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Several files may follow --text, as a shell's pattern gives them."""
    out = tmp_path / "corpus"
    arguments = ("prepare", "--text", *texts, "--out", out, "--held-out", "0", "--workers", "1")
    code, stdout, stderr = run(capsys, monkeypatch, *arguments, "--tokenizer", "train:60")
    assert code == 0, stderr
    corpus = Corpus(out)
    assert corpus.num_documents == 6 and corpus.num_sentences == 12
    assert f"train: 6 documents, 12 sentences, {corpus.num_tokens} tokens" in stdout
    assert str(out) in stdout and "tokens/s" in stdout

    code, stdout, _ = run(capsys, monkeypatch, *arguments, "--tokenizer", "train:60", "--json")
    report = json.loads(stdout)
    assert code == 0 and report["new_tokens"] == 0 and report["out"] == str(out)
    assert report["tokens"] == {"train": corpus.num_tokens, "valid": 0}

    again = (*arguments, "--tokenizer", out / "tokenizer", "--sentences", "lines", "--overwrite")
    code, stdout, stderr = run(capsys, monkeypatch, *again)
    assert code == 0 and "8 sentences" in stdout, stderr
    assert Corpus(out).num_tokens == corpus.num_tokens


def test_options_reach_it(texts: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    records = tmp_path / "c.jsonl"
    records.write_text('{"body": "New York is a City.", "title": "x"}\n{"b\n', encoding="utf-8")
    units = tmp_path / "units.tsv"
    units.write_text("New York\tLOC\n", encoding="utf-8")
    out = tmp_path / "corpus"
    code, stdout, stderr = run(
        capsys, monkeypatch, "prepare", "--text", records, "--text", texts[0], "--out", out,
        "--tokenizer", "train:200", "--cased", "--units", units, "--text-field", "body",
        "--skip-bad", "--held-out", "0", "--shard-tokens", "5", "--workers", "1", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["skipped"] == 1 and "c.jsonl: line 2 is not JSON" in report["problems"][0]
    assert report["shards"] > 1
    corpus = Corpus(out)
    assert corpus.tokenizer.token_to_id("N") is not None  # cased
    assert len(corpus.units(0, corpus.num_tokens)) == 1 == report["units"]["train"]


def test_bad_input_is_exit_code_2(
    texts: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\xff\n")
    out = tmp_path / "out"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("?")
    good = ("--text", texts[0])
    for arguments, message in (
        (("--text", bad, "--out", out), "bad.txt: line 2 is not UTF-8"),
        (("--text", tmp_path / "none.txt", "--out", out), "none.txt: no such file or folder"),
        (("--text", texts[0]), "--out"),
        ((*good, "--out", foreign), "foreign: is no corpus and not empty"),
        ((*good, "--out", out, "--tokenizer", "train:many"), "tokenizer: got train:many"),
        ((*good, "--out", out, "--tokenizer", foreign), "foreign holds no tokenizer.json"),
        ((*good, "--out", out, "--units", tmp_path / "u.tsv"), "u.tsv: no such file"),
        ((*good, "--out", out, "--held-out", "2"), "held_out: got 2.0"),
        ((*good, "--out", out, "--sentences", "words"), "sentences: got 'words'"),
        ((*good, "--out", out, "--workers", "0"), "--workers"),
    ):
        code, _, stderr = run(capsys, monkeypatch, "prepare", *arguments)
        text = "".join(stderr.split())  # boxes of the command line break lines anywhere
        assert code == 2 and "".join(message.split()) in text, (arguments, stderr)
        assert "Traceback" not in stderr


def test_help_says_what_it_is_for(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, stdout, _ = run(capsys, monkeypatch, "prepare", "--help")
    assert code == 0
    for word in ("pretraining", "--json", "train:N", "goes on where it stopped"):
        assert word in stdout
