"""Two processes under FSDP2 train as one does, and go on from each other's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.data import Corpus
from fastbert.pretrain import Options, Phase, Setting, preset, pretrain

pytestmark = pytest.mark.slow  # two processes that each import torch, again and again

CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
# Four batches an update: of one process, or two of each of two.
SETTING = Setting(
    steps=6, batch_tokens=256, workers=0, log_every=1, save_every=3, evaluate_every=3,
    evaluation_tokens=500,
)  # fmt: skip


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("size") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def options(size: str, **changes: Any) -> Options:
    found = preset("minutes", size=size, **changes)
    return dataclasses.replace(found, phases=(Phase(32, 100, 32),), warmup_steps=20)


def sharded(corpus: Corpus, out: Path, chosen: Options, resume: bool = False) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, str(Path(__file__).with_name("_sharded.py")), str(corpus.folder), str(out),
        chosen.to_json(), json.dumps(dataclasses.asdict(SETTING)), str(resume),
    ]  # fmt: skip
    begun = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in begun:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()[-3000:]


def losses(out: Path) -> dict[tuple[int, str], float]:
    """By step and summand, of training and of validation."""
    found = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        step, kind = row["step"], row["kind"]
        if kind == "train":
            names = row.keys() - {"step", "kind", "lr", "accuracy", "tokens_per_s", "mfu",
                                  "seconds", "tokens"}  # fmt: skip
            found |= {(step, name): row[name] for name in names}
            found |= {(step, f"right {name}"): x for name, x in row["accuracy"].items()}
        else:
            found |= {(step, f"valid {k}"): x["loss"] for k, x in row["validation"].items()}
    return found


def same(a: Path, b: Path) -> None:
    first, second = losses(a), losses(b)
    assert len(first) > 18 and first == pytest.approx(second, rel=5e-5, abs=1e-6)
    models = [load_file(out / "model" / "model.safetensors") for out in (a, b)]
    assert models[0].keys() == models[1].keys()
    for name, x in models[0].items():
        # A step of Adam is lr in size however small the gradient: roundings show.
        torch.testing.assert_close(x, models[1][name], rtol=1e-2, atol=2e-4)


def go_back(out: Path) -> None:
    """To the checkpoint of step 3, as if what came behind it had never been."""
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "model")


def test_shards_are_as_one(documentation: Corpus, size: str, tmp_path: Path) -> None:
    """While the model grows from one layer to two; then each goes on where the other was."""
    chosen = options(size, objective="mlm+nsp", source="pairs", stack=(1, 2))
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(documentation.folder, one, chosen, SETTING)
    sharded(documentation, two, chosen)
    same(one, two)
    for out in (one, two):
        shutil.copytree(out, out.with_name(f"{out.name} again"))
        go_back(out)
    sharded(documentation, one, chosen, resume=True)
    pretrain(documentation.folder, two, chosen, SETTING, resume=True)
    same(one, tmp_path / "one again")
    same(two, tmp_path / "two again")


def test_electra(documentation: Corpus, size: str, tmp_path: Path) -> None:
    """Ranks draw replacements of their own: what does not depend on them is the same."""
    chosen = options(size, objective="rtd", source="segments")
    pretrain(documentation.folder, tmp_path / "one", chosen, SETTING)
    sharded(documentation, tmp_path / "two", chosen)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    first = (1, "rtd/generator")
    assert one[first] == pytest.approx(two[first], rel=2e-5)
    assert one.keys() == two.keys()
    assert one == pytest.approx(two, rel=0.03, abs=0.1)
