"""Does a method of fine-tuning help? All of them on the same rows, epochs and seeds.

    python bench/methods.py --data FOLDER --by-hand FOLDER
    python bench/methods.py --data FOLDER --by-hand FOLDER --time

Each is trained as it comes, with the defaults of its paper. The development rows choose the epoch,
the test rows are looked at once. ``difference`` is the mean over seeds of the score less plain
fine-tuning's with the same seed, ``sd`` that of the scores. Rows are added to the file one by one:
a run that is stopped goes on where it was, and several may fill files of their own, which
``--merge`` joins. ``trec6:500`` are 500 of the training rows, in batches of 16: most methods are
made for few rows, and all need a few hundred updates.

``--time`` adds ``cost``: seconds of one epoch, in those of plain fine-tuning just before it. It
wants the machine to itself, where the scores do not mind company.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import finetune_data
import timing
from finetune_data import LabelledSet

from fastbert.demo import checkpoint
from fastbert.finetune import Setting, finetune
from fastbert.finetune.methods import METHODS

_BATCH = 16
BEST = ("layerwise-lr+r-drop", "layerwise-lr+freelb+label-smoothing", "smart+cls-norm")


def run(model: Path, data: LabelledSet, method: str, seed: int, epochs: int | None) -> dict:
    """Score of one run."""
    setting = Setting(epochs=epochs or data.epochs, batch=_BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        results = finetune(
            model, data.train, Path(scratch) / "out", task=data.task, dev=data.dev, test=data.test,
            method=method, setting=setting,
        )  # fmt: skip
    return {
        "set": data.name, "method": method, "seed": seed, "score_name": data.score,
        "score": results["test"][data.score]["value"],
        "learning_rate": results["setting"]["learning_rate"],
        "epochs": results["setting"]["epochs"],
    }  # fmt: skip


def seconds(model: Path, data: LabelledSet, method: str) -> float:
    """Of the updates of one epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        results = finetune(
            model, data.train, Path(scratch) / "out", task=data.task, dev=data.dev, method=method,
            setting=Setting(epochs=1, batch=_BATCH),
        )  # fmt: skip
    return results["seeds"][0]["seconds"]


def summary(runs: list[dict[str, Any]], costs: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each set and method that has run."""
    rows = []
    for name in dict.fromkeys(run["set"] for run in runs):
        here = [run for run in runs if run["set"] == name]
        plain = {run["seed"]: run["score"] for run in here if run["method"] == "plain"}
        for method in dict.fromkeys(run["method"] for run in here):
            mine = [run for run in here if run["method"] == method]
            scores = [run["score"] for run in mine]
            gains = [run["score"] - plain[run["seed"]] for run in mine if run["seed"] in plain]
            rows.append(
                {
                    "set": name,
                    "method": method,
                    "score": mine[0]["score_name"],
                    "seeds": len(mine),
                    "mean": statistics.mean(scores),
                    "sd": statistics.stdev(scores) if len(scores) > 1 else None,
                    "difference": statistics.mean(gains) if gains else None,
                    "cost": costs.get(method),
                }
            )
    return rows


class Results:
    """The file of results: ``runs``, ``costs`` and the rows made of them.

    machine: the one that ``costs`` were measured on; scores may come from several.
    """

    def __init__(self, path: Path, model: Path) -> None:
        self.path, self.model = path, model
        self.runs: list[dict[str, Any]] = []
        self.costs: dict[str, float] = {}
        self.machine = timing.machine()
        if path.exists():
            self.add(path)

    def add(self, path: Path) -> None:
        """What another file holds."""
        found = json.loads(path.read_text(encoding="utf-8"))
        self.runs += [run for run in found["runs"] if _key(run) not in self.done()]
        if found["costs"] and not self.costs:
            self.machine = found["machine"]
        self.costs.update(found["costs"])

    def done(self) -> set[tuple[str, str, int]]:
        return {_key(run) for run in self.runs}

    def write(self) -> None:
        rows = summary(self.runs, self.costs)
        result = {"machine": self.machine, "model": self.model.parent.name, "rows": rows,
                  "runs": self.runs, "costs": self.costs}  # fmt: skip
        timing.write(self.path, result)


def _key(run: dict[str, Any]) -> tuple[str, str, int]:
    return run["set"], run["method"], run["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: MiniLM-L6")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--by-hand", type=Path, help="where SICK is")
    parser.add_argument("--sets", default="trec6:500,trec50:500,sick-entailment:500")
    parser.add_argument("--methods", default=" ".join(("plain", *METHODS, *BEST)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench/results/finetune_methods.json"))
    parser.add_argument("--time", action="store_true", help="measure what each method costs")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files to take runs from")
    arguments = parser.parse_args()
    model = arguments.model or checkpoint()
    results = Results(arguments.out, model)
    if arguments.merge:
        for path in arguments.merge:
            results.add(path)
        return results.write()
    sets = finetune_data.prepare(arguments.sets.split(","), arguments.data, arguments.by_hand)
    methods = arguments.methods.split()
    if arguments.time:
        results.machine = timing.machine()
        for method in methods:
            plain = seconds(model, sets[0], "plain")
            results.costs[method] = seconds(model, sets[0], method) / plain
            results.write()
        return None
    # Seed by seed: what stands in the file early on is all methods, once.
    for seed in range(arguments.seeds):
        for data in sets:
            for method in methods:
                if (data.name, method, seed) in results.done():
                    continue
                results.runs.append(run(model, data, method, seed, arguments.epochs))
                print(json.dumps(results.runs[-1]), file=sys.stderr, flush=True)
                results.write()
    return None


if __name__ == "__main__":
    main()
