"""Two processes train as one does on the same global batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.data import Corpus

pytest.importorskip("accelerate")

CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(command: list[str], out: Path, processes: int) -> list[float]:
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    begun = [
        subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in begun:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()[-3000:]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (out / "model" / "model.safetensors").is_file()
    return [row["loss"] for row in rows if row["kind"] == "train"] + [
        row["validation"]["mlm"]["loss"] for row in rows if row["kind"] == "validation"
    ]


def test_two_processes_are_as_one(documentation: Corpus, tmp_path: Path) -> None:
    """512 tokens an update: two batches of one process, or one of each of two. Ranks see other
    numbers of targets: the loss is the mean over all of them nonetheless."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    command = [
        sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain", "--json",
        "--corpus", str(documentation.folder), "--size", str(config), "--steps", "10",
        "--length", "32", "--batch", "16", "--batch-tokens", "256", "--workers", "0",
    ]  # fmt: skip
    one = losses(command, tmp_path / "one", 1)
    two = losses(command, tmp_path / "two", 2)
    assert len(one) >= 1 and one == pytest.approx(two, rel=2e-5)
