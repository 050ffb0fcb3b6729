"""``fastbert pretrain``: what it lists, shows and refuses, and short runs of it. (More of these:
tests/pretrain/test_run.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastbert
from fastbert.data import prepare
from fastbert.demo import documentation_texts
from fastbert.pretrain import OBJECTIVES, PRESETS, SOURCES, Options, RunRecord, preset
from fastbert.pretrain.masking import MASK_TOKENS, WHAT
from fastbert.pretrain.spans import SPANS

MAIN = [sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain"]
SHORT = ("--length", "16", "--batch", "4", "--batch-tokens", "64", "--workers", "0", "--json")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def shown(*arguments: str) -> Options:
    done = run(*arguments, "--show")
    assert done.returncode == 0, done.stderr
    return Options.from_json(done.stdout)


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(documentation_texts(60)), encoding="utf-8")
    prepare([folder / "text.txt"], folder / "out", tokenizer="train:300", held_out=0.1,
            num_workers=1, progress=False)  # fmt: skip
    return folder / "out"


def test_list_names_everything_with_its_paper() -> None:
    done = run("--list")
    assert done.returncode == 0, done.stderr
    rows = [(name, x.summary, x.paper)
            for table in (OBJECTIVES, SOURCES, PRESETS)
            for name, x in table.items()]  # fmt: skip
    rows += [(name, what, paper)
             for table in (WHAT, SPANS, MASK_TOKENS)
             for name, (paper, what) in table.items()]  # fmt: skip
    lines = done.stdout.splitlines()
    for row in rows:
        assert any(line.split()[:1] == [row[0]] and all(text in line for text in row)
                   for line in lines), row  # fmt: skip


def test_show_prints_the_options_that_would_run(tmp_path: Path) -> None:
    changes = ("--size", "mini", "--rate", "0.4", "--mask", "whole-word", "--length", "64",
               "--lr", "3e-4", "--replace", "unk", "--span", "geometric:0.2",
               "--set", "masking.per=group", "--set", "optimizer=lamb",
               "--set", "objective_options.rtd.divisor=2")  # fmt: skip
    found = shown("--preset", "roberta", *changes)
    expected = preset(
        "roberta", size="mini", rate=0.4, what="word", learning_rate=3e-4, length=64,
        mask_token="unk", span="geometric:0.2", per="group", optimizer="lamb",
        objective_options={"rtd": {"divisor": 2}},
    )  # fmt: skip
    assert found == expected
    (tmp_path / "own.json").write_text(found.to_json())
    assert shown("--preset", str(tmp_path / "own.json"), "--rate", "0.4") == expected


@pytest.mark.parametrize(("name", "size"), [("minutes", "tiny"), ("bert-base", "base")])
def test_a_preset_has_the_size_of_its_name(name: str, size: str) -> None:
    assert shown("--preset", name).size == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "bart-base"), "preset: got 'bart-base', expected one of minutes"),
        (("--objective", "mlm+nap"), "objective: got 'nap', expected some of mlm"),
        (("--out", "somewhere"), "--corpus: missing, expected a folder"),
        (("--stack", "3,x"), "--stack: got '3,x', expected numbers"),
        (("--stack", "1,2,4,8"), "stack: got (1, 2, 4, 8), expected up to 3 numbers"),
        (("--mask", "letter"), "--mask: got 'letter', expected one of token, word, span"),
        (("--replace", "dot"), "--replace: got 'dot', expected one of mask, unk"),
        (("--set", "optimizer"), "set: got 'optimizer', expected name=value"),
        (("--set", "size=mini", "--size", "base"), "--set: got size, which another flag gives"),
        (("--size", "tiny", "--init", "somewhere"), "--size: got tiny beside --init"),
        (("--resume",), "holds no run to resume"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    extra = () if "--out" in arguments else ("--out", str(tmp_path / "run"))
    corpus = () if "missing" in message else ("--corpus", str(tmp_path))
    refused(run(*arguments, *extra, *corpus), message)
    assert not (tmp_path / "run").exists()


def test_resume_needs_the_folder_only(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begun = run("--corpus", str(corpus), "--out", str(out), "--steps", "2", *SHORT)
    assert begun.returncode == 0, begun.stderr
    assert "step 0: 2 layers" not in begun.stderr  # --json shows no progress
    validation = json.loads(begun.stdout)["validation"]
    again = run("--out", str(out), "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["validation"] == validation
    refused(run("--out", str(out), "--resume", "--rate", "0.5", "--seed", "7"),
            "masking.rate (got 0.5, it has 0.25), seed (got 7, it has 0)")  # fmt: skip
    longer = run("--out", str(out), "--resume", "--steps", "3")
    assert longer.returncode == 0, longer.stderr
    parameters = sum(
        p.numel() for p in fastbert.BertForMaskedLM.from_pretrained(out / "model").parameters()
    )
    assert f"step 2: 2 layers of 128, {parameters:,} parameters, 64 tokens an" in longer.stderr
    assert RunRecord.read(out).setting.steps == 3
    assert longer.stdout.strip().endswith(str(out / "model"))


def test_demo(tmp_path: Path) -> None:
    """Without a corpus, and not for a minute."""
    done = run("--demo", "--out", str(tmp_path / "demo"), "--steps", "2", *SHORT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["out"] == str(tmp_path / "demo/run") and told["validation"].keys() == {"mlm"}
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "demo/run/model")
    assert (model.config.hidden_size, model.config.vocab_size) == (128, 4000)
    again = run("--demo", "--out", str(tmp_path / "demo"), "--resume", "--steps", "3", "--json")
    assert again.returncode == 0, again.stderr


def test_one_of_two_processes_prints(
    corpus: Path, tmp_path: Path, in_processes: Callable[[list[str], int], None]
) -> None:
    """What each rank prints, in a file of its own."""
    printing = (
        "import os, sys; sys.stdout = open(sys.argv.pop(1) + os.environ['RANK'], 'w'); "
        "from fastbert.cli import main; main()"
    )
    in_processes(
        [sys.executable, "-c", printing, str(tmp_path / "rank"), "pretrain", "--corpus",
         str(corpus), "--out", str(tmp_path / "run"), "--steps", "2", *SHORT], 2,
    )  # fmt: skip
    assert json.loads((tmp_path / "rank0").read_text()).keys() == {"out", "validation"}
    assert (tmp_path / "rank1").read_text() == ""
