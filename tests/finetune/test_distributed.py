"""Two processes fine-tune as one does on the same updates."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Half an update at once: two batches of one process, or one of each of two.
_RUN = """
import sys
from pathlib import Path
from fastbert.finetune import Setting, finetune
model, train, dev, out = map(Path, sys.argv[1:])
finetune(model, train, out, task="classify", dev=dev, method="freelb:steps=2,magnitude=0",
         setting=Setting(epochs=2, learning_rate=1e-3, batch=16, batch_tokens=64, dropout=0.0))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(arguments: list[str], processes: int) -> None:
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in begun:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()[-3000:]


def test_two_processes_are_as_one(
    checkpoint: Path, reviews: tuple[Path, Path], tmp_path: Path
) -> None:
    logs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run([str(checkpoint), *map(str, reviews), str(out)], processes)
        lines = (out / "seed-0" / "log.jsonl").read_text().splitlines()
        logs.append([row for row in map(json.loads, lines) if row["kind"] == "train"])
        assert (out / "results.json").is_file()
    one, two = logs
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) > 5
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)
