"""A whole run: stopped and resumed, in phases, growing, on bad input, from the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastbert
from fastbert.data import prepare
from fastbert.demo import documentation_texts
from fastbert.pretrain import (
    NotFinite,
    Options,
    Phase,
    Setting,
    Trainer,
    preset,
    pretrain,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.txt"
    paragraphs = documentation_texts(300)
    text.write_text("\n\n".join(paragraphs), encoding="utf-8")
    prepare([text], folder / "out", tokenizer="train:400", held_out=0.1, num_workers=1,
            progress=False)  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("size") / "config.json"
    path.write_text(json.dumps({"model_type": "bert", **SMALL}))
    return str(path)


def options(size: str, **changes: Any) -> Options:
    found = preset("minutes", size=size, dropout=0.1, warmup_steps=10, **changes)
    phases = (Phase(32, 100, 16),)
    return dataclasses.replace(found, phases=changes.get("phases", phases))


def setting(steps: int = 12, **changes: Any) -> Setting:
    values: dict[str, Any] = {
        "batch_tokens": 256, "log_every": 1, "save_every": 4, "evaluate_every": 6, "workers": 0,
        "evaluation_tokens": 500,
    }  # fmt: skip
    return Setting(steps=steps, **(values | changes))


def log(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_s", "mfu")
    return [{k: x for k, x in row.items() if k not in clock} for row in rows]


def same_run(a: Path, b: Path) -> None:
    assert log(a) == log(b)
    first, second = (load_file(x / "model" / "model.safetensors") for x in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):
    pass


def stopped(corpus: Path, out: Path, chosen: Options, after: int, **changes: Any) -> None:
    """A run that ends without a word at step ``after``."""

    def tell(trainer: Trainer, noted: dict[str, Any]) -> None:
        if trainer.progress.step == after:
            raise Stop

    with pytest.raises(Stop):
        pretrain(corpus, out, chosen, setting(**changes), tell=tell)


def test_a_run_leaves_a_model_and_what_it_was_made_of(
    corpus: Path, size: str, tmp_path: Path
) -> None:
    last = pretrain(corpus, tmp_path / "run", options(size), setting(60))
    rows = log(tmp_path / "run")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.5
    assert last["mlm"]["loss"] == rows[-1]["validation"]["mlm"]["loss"] < losses[0]
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.hidden_size == 32 and model.config.vocab_size == 400
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "without dropout" not in card and model.config.hidden_dropout_prob == 0.1
    assert "60 steps" in card and f"{last['mlm']['loss']:.4f}" in card
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    assert Options.from_json(json.dumps(begun["options"])) == options(size)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stopped_run_goes_on_bit_by_bit(
    corpus: Path, size: str, tmp_path: Path, workers: int
) -> None:
    chosen = options(size, objective="mlm+sop", source="pairs")
    pretrain(corpus, tmp_path / "whole", chosen, setting())
    stopped(corpus, tmp_path / "stopped", chosen, after=7)
    assert log(tmp_path / "stopped")[-1]["step"] == 7  # a line more than the checkpoint knows
    pretrain(corpus, tmp_path / "stopped", chosen, setting(workers=workers), resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_phases_growth_ramp_and_accumulation(corpus: Path, size: str, tmp_path: Path) -> None:
    chosen = dataclasses.replace(
        options(size, objective="rtd"),
        phases=(Phase(16, 8, 32), Phase(32, 4, 32, learning_rate=1e-3, warmup_steps=2)),
        stack=(1, 2),
        ramp_start=8,
        ramp_steps=6,
    )
    seen: dict[int, tuple[int, int]] = {}

    def tell(trainer: Trainer, noted: dict[str, Any]) -> None:
        if noted["kind"] == "train":
            seen[noted["step"]] = trainer.model.config.num_hidden_layers, trainer.phase

    pretrain(corpus, tmp_path / "whole", chosen, setting(), tell=tell)
    layers = [seen[step][0] for step in range(1, 13)]
    assert layers == [1] * 4 + [2] * 8  # it grows behind 30% of the run
    assert [seen[step][1] for step in range(1, 13)] == [0] * 8 + [1] * 4
    tokens = [row["tokens"] for row in log(tmp_path / "whole") if row["kind"] == "train"]
    taken = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    assert taken[0] < 300 and taken[7] > 400 and taken[9] > 800  # 8 sequences of 16, … 32 of 32
    for after in (3, 9):  # before the first checkpoint, and after growing
        stopped(corpus, tmp_path / str(after), chosen, after)
        pretrain(corpus, tmp_path / str(after), chosen, setting(), resume=True)
        same_run(tmp_path / "whole", tmp_path / str(after))


def test_accumulated_batches_are_one_batch(corpus: Path, size: str, tmp_path: Path) -> None:
    """Of the same sequences: their gradients are added up before the step."""
    chosen = dataclasses.replace(options(size), dropout=0.0, phases=(Phase(32, 100, 32),))
    losses = []
    for batch_tokens in (1024, 128):
        out = tmp_path / str(batch_tokens)
        pretrain(corpus, out, chosen, setting(1, batch_tokens=batch_tokens))
        losses.append(log(out)[0]["tokens"])
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


def test_a_run_by_the_clock_ends(corpus: Path, size: str, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path, options(size), dataclasses.replace(
        setting(), steps=None, minutes=0.05))  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 3.0 <= rows[-1]["seconds"] < 6.0
    assert rows[-1]["kind"] == "validation"


def test_going_on_from_a_model(corpus: Path, size: str, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path / "first", options(size), setting(40))
    pretrain(corpus, tmp_path / "more", options(size), setting(1), init=tmp_path / "first/model")
    first, more = log(tmp_path / "first"), log(tmp_path / "more")
    assert more[0]["loss"] < first[0]["loss"] - 0.5


def test_a_loss_that_is_no_number_stops_the_run(corpus: Path, size: str, tmp_path: Path) -> None:
    def tell(trainer: Trainer, noted: dict[str, Any]) -> None:
        if noted["step"] == 5:
            with torch.no_grad():
                trainer.model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))

    with pytest.raises(NotFinite, match=r"^step 6: the loss is nan; .*step-00000004 is whole"):
        pretrain(corpus, tmp_path, options(size), setting(), tell=tell)
    pretrain(corpus, tmp_path, options(size), setting(), resume=True)
    assert log(tmp_path)[-1]["step"] == 12


def test_bad_input(corpus: Path, size: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^out: .* holds no run to resume"):
        pretrain(corpus, tmp_path, options(size), setting(), resume=True)
    pretrain(corpus, tmp_path / "run", options(size), setting(1))
    with pytest.raises(ValueError, match="^out: .* holds a run already"):
        pretrain(corpus, tmp_path / "run", options(size), setting(1))
    with pytest.raises(OSError, match="made/corpus.json: no such file, expected a folder that"):
        pretrain(tmp_path / "made", tmp_path / "none", options(size), setting(1))
    for bad in ({"steps": None}, {"minutes": 1.0}, {"batch_tokens": 0}, {"precision": "fp8"}):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(setting(1), **bad)


def test_killed_from_outside(corpus: Path, size: str, tmp_path: Path) -> None:
    """SIGKILL to a real process, wherever it happens to be, and --resume."""
    command = [
        sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain",
        "--corpus", str(corpus), "--size", size, "--steps", "40", "--batch-tokens", "256",
        "--length", "32", "--batch", "8", "--save-every", "5", "--evaluate-every", "20",
        "--workers", "0", "--json",
    ]  # fmt: skip
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True)
    assert whole.returncode == 0, whole.stderr.decode()
    begun = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = tmp_path / "killed" / "checkpoints"
    while begun.poll() is None and not list(checkpoints.glob("step-*10/state.json")):
        time.sleep(0.01)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "killed" / "model").exists()
    again = subprocess.run(
        [*command, "--out", str(tmp_path / "killed"), "--resume"], capture_output=True
    )
    assert again.returncode == 0, again.stderr.decode()
    same_run(tmp_path / "whole", tmp_path / "killed")
