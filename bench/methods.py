"""Does a method of fine-tuning help? All of them on the same rows, epochs and seeds.

    python bench/methods.py --data FOLDER --by-hand FOLDER --sets trec6:1000,sick-entailment:1000

Each is trained as it comes, with the defaults of its paper, and scored on the test rows behind the
last epoch; nothing is chosen by them. ``difference`` is the mean over seeds of the score less plain
fine-tuning's with the same seed, ``sd`` that of the scores. ``cost`` is in seconds of plain
fine-tuning, of runs that took turns with others on the same machine. Rows are added to the file one
by one: a run that is stopped goes on where it was. ``trec6:1000`` are 1,000 of the training rows:
most methods are made for few.
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

BEST = ("layerwise-lr+r-drop", "layerwise-lr+freelb+label-smoothing")


def run(model: Path, data: LabelledSet, method: str, seed: int, epochs: int | None) -> dict:
    """Score and seconds of one run."""
    setting = Setting(epochs=epochs or data.epochs, seed=seed, early_stop=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        results = finetune(
            model, data.train, out, task=data.task, dev=data.test, method=method, setting=setting
        )
        last = json.loads((out / f"seed-{seed}" / "log.jsonl").read_text().splitlines()[-1])
    return {
        "set": data.name, "method": method, "seed": seed, "score_name": data.score,
        "score": last["scores"][data.score]["value"], "seconds": results["seeds"][0]["seconds"],
        "learning_rate": results["setting"]["learning_rate"],
        "epochs": results["setting"]["epochs"],
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each set and method that has run."""
    rows = []
    for name in dict.fromkeys(run["set"] for run in runs):
        here = [run for run in runs if run["set"] == name]
        plain = {run["seed"]: run for run in here if run["method"] == "plain"}
        for method in dict.fromkeys(run["method"] for run in here):
            mine = [run for run in here if run["method"] == method]
            both = [(run, plain[run["seed"]]) for run in mine if run["seed"] in plain]
            scores = [run["score"] for run in mine]
            rows.append(
                {
                    "set": name,
                    "method": method,
                    "score": mine[0]["score_name"],
                    "seeds": len(mine),
                    "mean": statistics.mean(scores),
                    "sd": statistics.stdev(scores) if len(scores) > 1 else None,
                    "difference": statistics.mean(a["score"] - b["score"] for a, b in both)
                    if both else None,
                    "cost": statistics.median(a["seconds"] / b["seconds"] for a, b in both)
                    if both else None,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: MiniLM-L6")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--by-hand", type=Path, help="where SICK is")
    parser.add_argument("--sets", default="trec6:1000,sick-entailment:1000")
    parser.add_argument("--methods", default=" ".join(("plain", *METHODS, *BEST)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench/results/finetune_methods.json"))
    arguments = parser.parse_args()
    model = arguments.model or checkpoint()
    runs = []
    if arguments.out.exists():
        runs = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    done = {(run["set"], run["method"], run["seed"]) for run in runs}
    sets = finetune_data.prepare(arguments.sets.split(","), arguments.data, arguments.by_hand)
    # Seed by seed: what stands in the file early on is all methods, once.
    for seed in range(arguments.seeds):
        for data in sets:
            for method in arguments.methods.split():
                if (data.name, method, seed) in done:
                    continue
                runs.append(run(model, data, method, seed, arguments.epochs))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                result = {"machine": timing.machine(), "model": model.parent.name,
                          "rows": summary(runs), "runs": runs}  # fmt: skip
                timing.write(arguments.out, result)


if __name__ == "__main__":
    main()
