"""Two processes train as one does on the same global batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.data import Corpus

CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


Run = Callable[[list[str], int], None]


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (out / "model" / "model.safetensors").is_file()
    return [row["loss"] for row in rows if row["kind"] == "train"] + [
        row["validation"]["mlm"]["loss"] for row in rows if row["kind"] == "validation"
    ]


def test_two_processes_are_as_one(documentation: Corpus, tmp_path: Path, in_processes: Run) -> None:
    """512 tokens an update: two batches of one process, or one of each of two. Ranks see other
    numbers of targets: the loss is the mean over all of them nonetheless."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    command = [
        sys.executable, "-c", "from fastbert.cli import main; main()", "pretrain", "--json",
        "--corpus", str(documentation.folder), "--size", str(config), "--steps", "10",
        "--length", "32", "--batch", "16", "--batch-tokens", "256", "--workers", "0",
    ]  # fmt: skip
    for processes in (1, 2):
        in_processes([*command, "--out", str(tmp_path / str(processes))], processes)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) >= 1 and one == pytest.approx(two, rel=2e-5)
