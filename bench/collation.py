"""Whether data keeps up with the model: ``python bench/collation.py --corpus DIR``.

A pretraining run of ``fastbert pretrain --preset minutes``, with as many loader processes as
``--workers`` says, each in turn: what part of its time it computes, and what part it waits for the
next batch. On a CPU the loader's processes and the model share the cores, so tokens a second are
beside the share; on a GPU the size is base, in bf16, and every step is waited for.

DIR is what ``fastbert prepare`` wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import machine, write  # noqa: E402

from fastbert.pretrain import Setting, Trainer, preset  # noqa: E402
from fastbert.train.processes import accelerator  # noqa: E402

_TARGET = 0.95
_BEGINNING = 8  # steps of a turn that are not counted: workers start, and fill their queues


class Turn(NamedTuple):
    """Seconds of waiting and of computing, and the tokens of the steps that they are of."""

    waited: float
    computed: float
    tokens: int
    steps: int


def turn(trainer: Trainer, workers: int, seconds: float) -> Turn:
    """Steps for about so long, from a loader of its own."""
    trainer.setting = dataclasses.replace(trainer.setting, workers=workers)
    batches = trainer.training_batches()
    for _ in range(_BEGINNING):
        trainer.update([next(batches)])["loss"].item()
    waited = computed = 0.0
    tokens = steps = 0
    while waited + computed < seconds:
        began = time.perf_counter()
        batch = next(batches)
        had = time.perf_counter()
        trainer.update([batch])["loss"].item()
        waited += had - began
        computed += time.perf_counter() - had
        tokens += batch.inputs.num_tokens
        steps += 1
    return Turn(waited, computed, tokens, steps)


def row(workers: int, turns: list[Turn]) -> dict[str, Any]:
    waited, computed = sum(t.waited for t in turns), sum(t.computed for t in turns)
    tokens, steps = sum(t.tokens for t in turns), sum(t.steps for t in turns)
    shares = [t.computed / (t.waited + t.computed) for t in turns]
    found = {
        "workers": workers,
        "share_in_compute": computed / (waited + computed),
        "share_lowest_turn": min(shares),
        "wait_ms": 1e3 * waited / steps,
        "compute_ms": 1e3 * computed / steps,
        "tokens_per_s": tokens / (waited + computed),
        "steps": steps,
    }
    print(
        f"workers {workers}: {found['share_in_compute']:.1%} in compute (lowest turn "
        f"{min(shares):.1%}), waits {found['wait_ms']:.2f} ms of a step of "
        f"{found['wait_ms'] + found['compute_ms']:.1f}, {found['tokens_per_s']:,.0f} tokens/s",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--size", help="of the model; tiny on a CPU, base on a GPU")
    parser.add_argument("--batch-tokens", type=int, help="4096 on a CPU, 65536 on a GPU")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of workers")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    size = args.size or {"cpu": "tiny", "cuda": "base"}[where]
    batch_tokens = args.batch_tokens or {"cpu": 4096, "cuda": 65_536}[where]
    precision = {"cpu": "no", "cuda": "bf16"}[where]
    setting = Setting(steps=1_000_000, batch_tokens=batch_tokens, precision=precision)
    turns: dict[int, list[Turn]] = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        options = preset("minutes", size=size)
        trainer = Trainer(args.corpus, options, setting, Path(folder), accelerator(precision))
        for _ in range(args.turns):
            for workers, done in turns.items():
                done.append(turn(trainer, workers, args.seconds / args.turns))
    rows = [row(workers, done) for workers, done in turns.items()]
    result = {
        "machine": machine(),
        "size": size,
        "batch_tokens": batch_tokens,
        "corpus_tokens": trainer.corpus.num_tokens,
        "target_share_in_compute": _TARGET,
        "rows": rows,
    }
    path = args.out or Path(__file__).parent / "results" / f"collation_{where}.json"
    write(path, result)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
