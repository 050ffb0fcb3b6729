"""Whole runs: stopped and resumed, of several seeds, of several methods, on bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastbert
from fastbert.compress import load_float
from fastbert.finetune import NotFinite, Setting, Trainer, evaluate, finetune, load
from fastbert.finetune import run as run_module
from fastbert.finetune.data import read_data
from fastbert.finetune.table import Table

Paths = tuple[Path, Path]


def setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch": 8, "dropout": 0.1}
    return Setting(**(values | changes))


def log(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: x for k, x in row.items() if k != "seconds"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


_FSDP = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))


class Stop(Exception):
    pass


def test_learns_and_leaves_a_model(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    told: list[dict[str, Any]] = []
    results = finetune(
        checkpoint, train, tmp_path / "out", task="classify", dev=dev, test=dev,
        setting=setting(epochs=8, learning_rate=3e-3), tell=told.append,
    )  # fmt: skip
    assert results["dev"]["accuracy"]["value"] >= 0.95
    assert results["test"] == results["dev"]
    assert [row["kind"] for row in told if row["kind"] != "train"] == ["data"] + ["dev"] * 8
    losses = [row["loss"] for row in told if row["kind"] == "train"]
    assert losses[-1] < losses[0] / 2
    folder = tmp_path / "out" / "model"
    model = fastbert.BertForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "blame", 1: "praise"}
    rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert len(rows) == 40 and first["line"] == 2 and first["gold"] in ("praise", "blame")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["sources"] == {
        "train": str(train), "dev": str(dev), "test": str(dev)
    }  # fmt: skip
    for name in ("confusion.png", "calibration.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "| dev | accuracy |" in (folder / "README.md").read_text()
    assert not list((tmp_path / "out").glob("seed-*/*.safetensors"))
    # The folder alone says how data are to be read.
    again = evaluate(load(folder), folder, dev)
    assert again.scores is not None
    assert again.scores["accuracy"].value == results["dev"]["accuracy"]["value"]


def test_the_best_epoch_is_kept_not_the_last(
    checkpoint: Path, reviews: Paths, tmp_path: Path
) -> None:
    """A rate that ruins the model: what was best stands in the first evaluations."""
    train, dev = reviews
    told: list[dict[str, Any]] = []
    results = finetune(
        checkpoint, train, tmp_path / "out", task="classify", dev=dev,
        setting=setting(epochs=6, learning_rate=3e-3, warmup=0.0, evaluations=2),
        tell=told.append,
    )  # fmt: skip
    scores = [row["scores"]["accuracy"]["value"] for row in told if row["kind"] == "dev"]
    assert len(scores) == 12
    assert results["dev"]["accuracy"]["value"] == max(scores) == results["seeds"][0]["best"]


@pytest.mark.parametrize("method", ["plain", "smart", "freelb:steps=2"])
def test_a_stopped_run_goes_on_bit_by_bit(
    checkpoint: Path, reviews: Paths, tmp_path: Path, method: str
) -> None:
    train, dev = reviews

    def run(out: Path, stop_at: int = -1, resume: bool = False) -> None:
        def tell(noted: dict[str, Any]) -> None:
            if noted.get("step", 0) == stop_at:
                raise Stop

        finetune(
            checkpoint, train, out, task="classify", dev=dev, method=method, resume=resume,
            setting=setting(evaluations=3), tell=tell,
        )  # fmt: skip

    run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", stop_at=15)
    run(tmp_path / "parts", resume=True)
    assert log(tmp_path / "whole" / "seed-0") == log(tmp_path / "parts" / "seed-0")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


_KILLED = """
import sys
from pathlib import Path
from fastbert.finetune import Setting, finetune
model, train, dev, out = map(Path, sys.argv[1:5])
finetune(model, train, out, task="classify", dev=dev, resume=len(sys.argv) > 5,
         setting=Setting(epochs=2, learning_rate=1e-3, batch=8, evaluations=6, dropout=0.1))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    def command(out: Path, *more: str) -> list[str]:
        return [sys.executable, "-c", _KILLED, str(checkpoint), *map(str, (*reviews, out)), *more]

    # One thread: bits do not depend on what else the machine does.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment)
    process = subprocess.Popen(command(tmp_path / "parts"), env=environment)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "parts").glob("seed-0/checkpoints/step-*/state.json"))) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "results.json").exists()
    subprocess.run(command(tmp_path / "parts", "resume"), check=True, env=environment)
    assert log(tmp_path / "whole" / "seed-0") == log(tmp_path / "parts" / "seed-0")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_worse_seeds_stop_early(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    told: list[dict[str, Any]] = []
    results = finetune(
        checkpoint, train, tmp_path / "out", task="classify", dev=dev, seeds=3,
        setting=setting(early_stop=0.5), tell=told.append,
    )  # fmt: skip
    kept = next(row["kept"] for row in told if row["kind"] == "early stop")
    assert len(kept) == 2
    steps = {row["seed"]: row["steps"] for row in results["seeds"]}
    whole = max(steps.values())
    assert {seed for seed, n in steps.items() if n == whole} == set(kept)
    assert {n for seed, n in steps.items() if seed not in kept} == {whole // 2}
    halfway = {
        row["seed"]: row["scores"]["accuracy"]["value"]
        for row in reversed(told) if row["kind"] == "dev" and row["step"] <= whole // 2
    }  # fmt: skip
    given_up = next(seed for seed in steps if seed not in kept)
    assert halfway[given_up] <= min(halfway[seed] for seed in kept)
    assert results["seed"] in kept


@pytest.mark.parametrize("stop_at", [6, 20])
def test_seeds_that_stop_early_are_the_same_when_resumed(
    checkpoint: Path, reviews: Paths, tmp_path: Path, stop_at: int
) -> None:
    """Stopped before the decision, and behind it, where what is written down counts, not the
    evaluations that the seeds have by then."""
    train, dev = reviews
    arguments: dict[str, Any] = {
        "task": "classify", "dev": dev, "seeds": 2,
        "setting": setting(early_stop=0.5, evaluations=6),
    }  # fmt: skip
    whole = finetune(checkpoint, train, tmp_path / "whole", **arguments)
    out = tmp_path / "parts"

    def tell(noted: dict[str, Any]) -> None:
        if noted.get("step", 0) == stop_at and noted["kind"] == "train":
            raise Stop

    with pytest.raises(Stop):
        finetune(checkpoint, train, out, tell=tell, **arguments)
    decided, expected = out / "kept.json", whole["seed"]
    assert decided.exists() == (stop_at == 20)
    if decided.exists():
        expected = 1 - expected
        decided.write_text(json.dumps([expected]))
    assert finetune(checkpoint, train, out, resume=True, **arguments)["seed"] == expected


def test_patience_ends_a_run(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    results = finetune(
        checkpoint, train, tmp_path / "out", task="classify", dev=dev,
        setting=setting(epochs=20, learning_rate=1e-9, patience=2),
    )  # fmt: skip
    # The first evaluation is the best, the two behind it are no better.
    assert results["seeds"][0]["steps"] == pytest.approx(3 * 12, abs=3)


def test_accumulation_changes_nothing(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    """An update of two batches has the gradients of one of both, without dropout."""
    whole = setting(dropout=0.0, batch=16)
    data = read_data(checkpoint, "classify", *reviews, setting=whole)
    results = []
    for chosen in (whole, whole.replace(batch_tokens=64)):
        model = run_module.saved.start(checkpoint, data.task, chosen, 0)
        trainer = Trainer(
            model, data.task, run_module.parse("plain"), data.train, data.dev, chosen, tmp_path,
            accelerate.Accelerator(cpu=True), 0,
        )  # fmt: skip
        examples = [data.train.features[i] for i in range(16)]
        parts = [examples] if chosen is whole else [examples[:5], examples[5:]]
        loss = trainer.update(parts)
        results.append((loss, {n: p.detach().clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter, results[1][1][name], atol=2e-5, rtol=1e-4)


def test_update_counts_and_rates(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    chosen = setting(epochs=3, warmup=0.25, evaluations=2)
    data = read_data(checkpoint, "classify", *reviews, setting=chosen)
    trainer = Trainer(
        run_module.saved.start(checkpoint, data.task, chosen, 0), data.task,
        run_module.parse("layerwise-lr:.5"), data.train, data.dev, chosen, tmp_path,
        accelerate.Accelerator(cpu=True), 0,
    )  # fmt: skip
    assert len(trainer.ends) == 3 and len(trainer.looks) == 6
    assert trainer.total_steps == pytest.approx(3 * 96 / 8, abs=4)
    rates = []
    for noted in trainer.run():
        if noted["kind"] == "train":
            rates.append(noted["lr"])
    assert trainer.tokens == 3 * int(data.train.features.lengths.sum())
    assert max(rates) <= 1e-3 and rates[-1] < 1e-3 / trainer.total_steps * 2
    assert rates.index(max(rates)) == pytest.approx(0.25 * len(rates), abs=2)
    scales = {group["lr_scale"] for group in trainer.optimizer.param_groups}
    assert scales == {1.0, 0.5, 0.25, 0.125, 0.0625}


@pytest.mark.parametrize(
    "method", ["scalar-mix", "squeeze-excitation", "gated-layers", "adapters", "lora"]
)
def test_models_with_more_parts_load_again(
    checkpoint: Path, reviews: Paths, tmp_path: Path, method: str
) -> None:
    train, dev = reviews
    results = finetune(
        checkpoint, train, tmp_path / "out", task="classify", dev=dev, method=method,
        setting=setting(epochs=1),
    )  # fmt: skip
    folder = tmp_path / "out" / "model"
    again = evaluate(load(folder), folder, dev)
    assert again.scores is not None
    assert again.scores["calibration_error"].value == pytest.approx(
        results["dev"]["calibration_error"]["value"], abs=1e-5
    )
    if method == "lora":  # merged
        assert fastbert.quantize(load(folder)).report.integer
        return
    for source in (lambda: load(folder), lambda: load_float(folder)):
        with pytest.raises(ValueError, match=f"was fine-tuned with {method}"):
            fastbert.quantize(source())


def test_two_stages_swap_the_head(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    finetune(checkpoint, train, tmp_path / "first", task="classify", dev=dev, setting=setting())
    first = tmp_path / "first" / "model"
    data = read_data(first, "classify", train, dev, setting=setting())
    start = run_module.saved.start
    kept = start(first, data.task, setting(), 0).state_dict()
    new = start(first, data.task, setting(), 0, new_head=True).state_dict()
    trained = weights(tmp_path / "first")
    head = "classifier.weight"
    assert torch.equal(kept[head], trained[head]) and not torch.equal(new[head], trained[head])
    others = [name for name in trained if not name.startswith("classifier")]
    assert all(torch.equal(new[name], trained[name]) for name in others)


def test_a_model_without_labels_of_its_own_is_evaluated_by_task(
    checkpoint: Path, reviews: Paths, tmp_path: Path
) -> None:
    train, dev = reviews
    data = read_data(checkpoint, "classify", train, dev, setting=setting())
    model = run_module.saved.start(checkpoint, data.task, setting(), 0)
    model.save_pretrained(tmp_path)
    found = evaluate(load(tmp_path), tmp_path, dev, task="classify")
    assert found.scores is not None and 0 <= found.score <= 1
    with pytest.raises(ValueError, match=r"task: .* holds no task\.json"):
        evaluate(load(tmp_path), tmp_path, dev)


# --- bad input --------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, line: int, fields: list[str]) -> Path:
    rows = list(csv.reader(source.open(newline="", encoding="utf-8")))
    rows[line - 1] = fields
    with target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return target


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["", "praise"], "empty text"),
        (["a cat", "awe"], "unknown label"),
        (["a cat", ""], "no label"),
        (["a cat", "nan"], "no label"),
    ],
)
def test_bad_rows_are_named_or_counted(
    checkpoint: Path, reviews: Paths, tmp_path: Path, fields: list[str], reason: str
) -> None:
    train, dev = reviews
    bad = rewritten(dev, tmp_path / "bad.csv", 7, fields)
    with pytest.raises(ValueError, match=rf"bad\.csv, line 7: {reason}"):
        read_data(checkpoint, "classify", train, bad, setting=setting())
    data = read_data(checkpoint, "classify", train, bad, setting=setting(), skip_bad=True)
    assert data.left_out == {reason: 1} and len(data.dev.table) == 39


def test_one_class_only(checkpoint: Path, tmp_path: Path) -> None:
    table = Table.of("one.csv", text=["a cat", "a dog"], label=["x", "x"])
    with pytest.raises(ValueError, match=r"one\.csv: label: all rows have 'x'"):
        finetune(checkpoint, table, tmp_path / "out", task="classify")
    assert not (tmp_path / "out").exists()


def test_a_tenth_is_held_out(checkpoint: Path, reviews: Paths) -> None:
    data = read_data(checkpoint, "classify", reviews[0], setting=setting())
    assert (len(data.train.table), len(data.dev.table)) == (86, 10)
    numbers = np.concatenate([data.train.table.numbers, data.dev.table.numbers])
    assert sorted(numbers.tolist()) == list(range(2, 98))


def test_not_finite(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    train, dev = reviews
    with pytest.raises(NotFinite, match="loss is (nan|inf)"):
        finetune(
            checkpoint, train, tmp_path / "out", task="classify", dev=dev,
            setting=setting(learning_rate=1e30, warmup=0.0, max_grad_norm=1e30),
        )  # fmt: skip


def test_parameters_that_overflowed_are_never_saved(
    checkpoint: Path, reviews: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a good loss: the checkpoint before it stays, and the run can go on from there."""
    train, dev = reviews
    arguments: dict[str, Any] = {
        "task": "classify", "dev": dev, "setting": setting(evaluations=3, dropout=0.0),
    }  # fmt: skip
    whole = finetune(checkpoint, train, tmp_path / "whole", **arguments)
    update = Trainer.update

    def overflowing(self: Trainer, parts: Any) -> torch.Tensor:
        loss = update(self, parts)
        if self.step == max(self.looks - {self.total_steps}):
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "update", overflowing)
    out = tmp_path / "out"
    with pytest.raises(NotFinite, match="parameters are no numbers any more"):
        finetune(checkpoint, train, out, **arguments)
    monkeypatch.undo()
    assert finetune(checkpoint, train, out, resume=True, **arguments)["dev"] == whole["dev"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sing"}, "task: got 'sing'"),
        ({"method": "nothing"}, "method: got 'nothing'"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"setting": setting(max_length=64)}, "max_length: got 64, expected at most 32"),
        ({"columns": {"text": "txt"}}, "no column 'txt' for 'text' .is 'text' meant"),
        ({"resume": True}, "holds no run to resume"),
        ({"train": "nowhere.csv"}, "nowhere.csv"),
        ({"accelerator": _FSDP}, "accelerate: got FSDP, expected DDP"),
        (
            {
                "task": "regress",
                "train": Table.of("t", text=["a", "b"], label=[1.0, 2.0]),
                "method": "class-weights",
            },
            "class-weights: got a model for regression",
        ),
    ],
)
def test_bad_arguments(
    checkpoint: Path, reviews: Paths, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = {"train": reviews[0], "task": "classify", "setting": setting(), **changes}
    train = arguments.pop("train")
    with pytest.raises((ValueError, OSError), match=message):
        finetune(checkpoint, train, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_run(checkpoint: Path, reviews: Paths, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"task": "classify", "dev": reviews[1]}
    finetune(checkpoint, reviews[0], tmp_path, setting=setting(epochs=1), **arguments)
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(checkpoint, reviews[0], tmp_path, setting=setting(epochs=1), **arguments)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="resume: setting of the run"):
        finetune(checkpoint, reviews[0], tmp_path, setting=setting(), resume=True, **arguments)


@pytest.mark.parametrize("field", ["epochs", "learning_rate", "batch", "evaluations", "keep"])
def test_bad_settings(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: got 0"):
        Setting(**{field: 0})  # type: ignore[arg-type]


def test_defaults_follow_the_data() -> None:
    def filled(rows: int, hidden: int = 768) -> Setting:
        config = fastbert.BertConfig(hidden_size=hidden, num_attention_heads=4)
        return Setting().for_data(rows, config)

    assert [filled(n).epochs for n in (10, 1000, 4000, 10**6)] == [20, 16, 4, 3]
    assert filled(1000).learning_rate == 3e-5
    assert filled(1000, 384).learning_rate == 8.5e-5
    assert Setting(epochs=1, learning_rate=1.0).for_data(9, fastbert.BertConfig()).epochs == 1
