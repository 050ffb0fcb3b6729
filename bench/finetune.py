"""Fine-tuning beside the Trainer of Hugging Face: the same checkpoint, rows, epochs, seeds.

    python bench/finetune.py --model FOLDER --data FOLDER --by-hand FOLDER
    python bench/finetune.py --model FOLDER --data FOLDER --sets trec6 --seeds 3 --out results.json

Each run is a process of its own; fastbert and its peers take turns, seed by seed, so that a noisy
machine disturbs all alike. Every one trains all rows of the training set as often, in updates of as
many rows (fastbert's take as many tokens as these have on average), with the same peak rate,
warm-up and decay, AdamW, weight decay, dropout and clipping; the last epoch's model is scored on
the test rows by the same code. ``int8_loss`` is what quantising to int8 takes from the score. Times
are those of the training loop alone: no imports, no tokenisation, no evaluation; ``--untimed``
leaves them out, for a machine that does other things beside.

    trainer           transformers.Trainer, SDPA, padding to the longest of a batch
    trainer sorted    the same, with batches of rows of like lengths (group_by_length)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import finetune_data
import timing
from finetune_data import LabelledSet

from fastbert.demo import checkpoint
from fastbert.finetune.setting import Setting

RUNNERS = ("fastbert", "trainer", "trainer sorted")
SETS = ("trec6", "sick-entailment", "sick-relatedness")


# --- one run, in a process of its own -----------------------------------------------------------


def run_fastbert(model: Path, data: LabelledSet, setting: Setting, out: Path) -> dict[str, Any]:
    from fastbert.finetune import finetune

    results = finetune(
        model, data.train, out, task=data.task, dev=data.test, test=data.test, setting=setting
    )
    # Scored where the other runners are: behind the last epoch.
    last = json.loads((out / f"seed-{setting.seed}" / "log.jsonl").read_text().splitlines()[-1])
    (seed,) = results["seeds"]
    return {
        "seconds": seed["seconds"], "tokens": seed["tokens"], "updates": seed["steps"],
        "score": last["scores"][data.score]["value"],
        "int8_loss": results["test"][data.score]["value"] - _int8_score(out / "model", data),
    }  # fmt: skip


def _int8_score(folder: Path, data: LabelledSet) -> float:
    """On the test rows, of the model as ``fastbert quantize`` makes it of the folder."""
    from fastbert.compress import load_float, quantize
    from fastbert.finetune import evaluate

    found = evaluate(quantize(load_float(folder)), folder, data.test)
    assert found.scores is not None
    return found.scores[data.score].value


def run_trainer(
    model: Path, data: LabelledSet, setting: Setting, out: Path, group: bool
) -> dict[str, Any]:
    """The same task, read by fastbert, trained by transformers."""
    import torch
    import transformers

    from fastbert.finetune.data import read_data

    assert setting.epochs is not None and setting.learning_rate is not None
    read = read_data(model, data.task, data.train, data.test, setting=setting)
    task, config = read.task, read.task.config()
    transformers.set_seed(setting.seed)
    kind = getattr(transformers, "Auto" + task.model.__name__.removeprefix("Bert").replace(
        "For", "ModelFor", 1))  # fmt: skip
    network = kind.from_pretrained(model, attn_implementation="sdpa", **config, **setting.rates())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    padded: Any = transformers.DataCollatorWithPadding(tokenizer)
    if data.task == "tag":
        padded = transformers.DataCollatorForTokenClassification(tokenizer)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, features: Any) -> None:
            self.features = features

        def __len__(self) -> int:
            return len(self.features)

        def __getitem__(self, index: int) -> dict[str, Any]:
            example = self.features[index]
            return {name: x.tolist() for name, x in example.items()}

    arguments = transformers.TrainingArguments(
        output_dir=str(out), num_train_epochs=setting.epochs, learning_rate=setting.learning_rate,
        per_device_train_batch_size=setting.batch, per_device_eval_batch_size=64,
        warmup_steps=setting.warmup, weight_decay=setting.weight_decay,
        max_grad_norm=setting.max_grad_norm, lr_scheduler_type="linear", seed=setting.seed,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True,
        train_sampling_strategy="group_by_length" if group else "random",
    )  # fmt: skip
    trainer = transformers.Trainer(
        network, arguments, data_collator=padded, train_dataset=Rows(read.train.features)
    )
    began = time.perf_counter()
    done = trainer.train()
    seconds = time.perf_counter() - began
    outputs = trainer.predict(Rows(read.dev.features)).predictions
    lengths = read.dev.features.lengths.tolist()
    if isinstance(outputs, tuple):  # start and end of an answer
        import numpy as np

        outputs = np.stack(outputs, -1)
    if data.task in ("tag", "qa"):
        outputs = [logits[:length] for logits, length in zip(outputs, lengths, strict=True)]
    predictions = task.decode(list(outputs), read.dev.features, read.dev.table)
    return {
        "seconds": seconds,
        "tokens": setting.epochs * int(read.train.features.lengths.sum()),
        "updates": done.global_step,
        "score": task.scores(predictions, read.dev.table)[data.score].value,
    }


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    data = LabelledSet(*(Path(x) if i in (2, 3, 4) else x for i, x in enumerate(job["data"])))
    setting = Setting(**job["setting"])
    with tempfile.TemporaryDirectory() as scratch:
        out, model = Path(scratch) / "out", Path(job["model"])
        if job["runner"] == "fastbert":
            return run_fastbert(model, data, setting, out)
        return run_trainer(model, data, setting, out, job["runner"] == "trainer sorted")


# --- all of them --------------------------------------------------------------------------------


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """What ``run_one`` gives in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise RuntimeError(f"{job['runner']} on {job['data'][0]}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    model: Path,
    data: LabelledSet,
    runners: list[str],
    seeds: int,
    epochs: int | None,
    timed: bool = True,
) -> dict[str, Any]:
    """One row of the results: each runner's seconds and scores, seed by seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    from fastbert.finetune.run import settled

    setting = settled(
        model, task=data.task, train=data.train, dev=data.test,
        setting=Setting(epochs=epochs or data.epochs, early_stop=0.0),
    )  # fmt: skip
    for seed in range(seeds):
        # Another one goes first each time.
        for name in [*runners[seed % len(runners) :], *runners[: seed % len(runners)]]:
            job = {
                "runner": name, "model": str(model), "data": [str(x) if isinstance(x, Path) else x
                                                             for x in data],
                "setting": setting.replace(seed=seed).to_dict(),
            }  # fmt: skip
            run = in_a_process(job)
            if not timed:
                del run["seconds"]
            found[name].append(run)
            print(data.name, name, seed, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    row: dict[str, Any] = {
        "set": data.name, "score": data.score, "bar": data.bar, "setting": setting.to_dict(),
        "runs": found,
    }  # fmt: skip
    for name, runs in found.items():
        scores = [run["score"] for run in runs]
        row[name] = {
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        if not timed:
            continue
        row[name]["seconds"] = statistics.median(run["seconds"] for run in runs)
        row[name]["tokens_per_s"] = statistics.median(r["tokens"] / r["seconds"] for r in runs)
        if name != "fastbert" and "fastbert" in found:
            pairs = zip(runs, found["fastbert"], strict=True)
            row[name]["speedup"] = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: MiniLM-L6")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--by-hand", type=Path, help="where SICK and XQuAD are")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--runners", default=",".join(RUNNERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results/finetune_cpu.json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return print(json.dumps(run_one(json.loads(arguments.job))))
    model = arguments.model or checkpoint()
    rows = []
    if arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
    sets = finetune_data.prepare(arguments.sets.split(","), arguments.data, arguments.by_hand)
    for data in sets:
        row = measure(
            model, data, arguments.runners.split(","), arguments.seeds, arguments.epochs,
            not arguments.untimed,
        )  # fmt: skip
        row["machine"] = timing.machine()  # of the row: other sets may have run elsewhere
        rows = [other for other in rows if other["set"] != data.name] + [row]
        timing.write(arguments.out, {"model": model.parent.name, "rows": rows})


if __name__ == "__main__":
    main()
