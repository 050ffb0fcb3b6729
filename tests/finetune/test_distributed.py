"""Two processes fine-tune as one does on the same updates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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


def test_two_processes_are_as_one(
    checkpoint: Path,
    reviews: tuple[Path, Path],
    tmp_path: Path,
    in_processes: Callable[[list[str], int], None],
) -> None:
    logs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        files = (checkpoint, *reviews, out)
        in_processes([sys.executable, "-c", _RUN, *map(str, files)], processes)
        lines = (out / "seed-0" / "log.jsonl").read_text().splitlines()
        logs.append([row for row in map(json.loads, lines) if row["kind"] == "train"])
        assert (out / "results.json").is_file()
    one, two = logs
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) > 5
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)
