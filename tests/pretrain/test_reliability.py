"""What stops a run says what is wrong, with exit code 2; the last good checkpoint stays, and with
the cause out of the way ``--resume`` ends as an undisturbed run does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.data import prepare
from fastbert.demo import documentation_texts
from fastbert.pretrain import Setting, preset, pretrain
from fastbert.train import checkpoint

MAIN = "from fastbert.cli import main; main()"
SAVED = "checkpoints/step-00000004"  # the last one of a run of 8 that does not reach its end

# The disk fills behind the first checkpoint: no file may grow beyond so many bytes.
FULL_DISK = """
import resource
from fastbert.train import checkpoint
save = checkpoint.save
def save_and_fill(*args, **kwargs):
    path = save(*args, **kwargs)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return path
checkpoint.save = save_and_fill
"""
# What step 6 computes with is no number any more.
BREAK_STEP_6 = """
import torch
from fastbert.pretrain import Trainer
update = Trainer.update
def broken(self, *args, **kwargs):
    if self.progress.step == 5:
        with torch.no_grad():
            self.model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    return update(self, *args, **kwargs)
Trainer.update = broken
"""
# Step 8 has a good loss, and a gradient that overflowed.
BREAK_BEHIND_STEP_8 = """
import torch
from fastbert.pretrain import Trainer
update = Trainer.update
def overflowing(self, *args, **kwargs):
    seen = update(self, *args, **kwargs)
    if self.progress.step == 7:
        with torch.no_grad():
            self.model.bert.embeddings.word_embeddings.weight.fill_(float("inf"))
    return seen
Trainer.update = overflowing
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a size, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("\n\n".join(documentation_texts(300)), encoding="utf-8")
    prepare([folder / "text.txt"], folder / "corpus", tokenizer="train:400", held_out=0.1,
            num_workers=1, progress=False)  # fmt: skip
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    }))  # fmt: skip
    done = run(folder, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    shutil.copy(made / "config.json", tmp_path)
    return tmp_path


def run(place: Path, out: Path, *more: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-c", before + "\n" + MAIN, "pretrain", "--corpus", str(place / "corpus"),
        "--size", str(place / "config.json"), "--out", str(out), "--steps", "8", "--length", "32",
        "--batch", "8", "--batch-tokens", "256", "--save-every", "4", "--evaluate-every", "4",
        "--workers", "0", "--json", *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def stopped(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fastbert: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in said[0]


def goes_on(made: Path, place: Path, out: Path) -> None:
    """From step 4, to the same bits."""
    assert checkpoint.latest(out / "checkpoints") == out / SAVED
    assert not (out / "model").exists()
    done = run(place, out, "--resume")
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(x / "model/model.safetensors") for x in (out, made / "run"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("limit", "file"), [(64_000, "step-00000008: this checkpoint"), (10, "log.jsonl: step 4")]
)
def test_full_disk(made: Path, place: Path, limit: int, file: str) -> None:
    out = place / "run"
    done = run(place, out, before=FULL_DISK.format(limit=limit))
    stopped(done, file, "could not be", "File too large")
    goes_on(made, place, out)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (BREAK_STEP_6, "step 6: the loss is nan; "),
        (BREAK_BEHIND_STEP_8, "step 8: parameters are no numbers any more; "),
    ],
)
def test_what_is_no_number(made: Path, place: Path, before: str, message: str) -> None:
    done = run(place, place / "run", before=before)
    stopped(done, message, f"{place / 'run' / SAVED} is whole")
    goes_on(made, place, place / "run")


def remove(shard: Path) -> None:
    shard.unlink()


def cut(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)


def flip(shard: Path) -> None:
    """One bit in the middle: the file looks right, and says other words."""
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, cut, flip])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_damaged_shard(place: Path, damage: Callable[[Path], None], split: str) -> None:
    """Nothing is begun."""
    shard = last_shard(place, split)
    damage(shard)
    with pytest.raises((ValueError, OSError), match=re.escape(str(shard))):
        pretrain(place / "corpus", place / "run", preset("minutes"), Setting(steps=1))
    assert not (place / "run").exists()


def test_shard_damaged_meanwhile(made: Path, place: Path) -> None:
    """Between a run and its resumption."""
    out, shard = place / "run", last_shard(place, "train")
    good = shard.read_bytes()
    stopped(run(place, out, before=BREAK_STEP_6), "step 6")
    flip(shard)
    stopped(run(place, out, "--resume"), str(shard), "corrupt")
    shard.write_bytes(good)
    goes_on(made, place, out)


def last_shard(place: Path, split: str) -> Path:
    return sorted((place / "corpus" / split).glob("*.safetensors"))[-1]
