"""What is written beside a fine-tuned model for a person to look at."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.finetune.columns import TARGETS
from fastbert.finetune.metrics import confusion, reliability
from fastbert.finetune.table import Table
from fastbert.finetune.tasks import Task
from fastbert.finetune.tasks.targets import Outcomes, Prediction

PREDICTIONS, CONFUSION, CALIBRATION = "predictions.jsonl", "confusion.png", "calibration.png"
_MOST_CLASSES = 60  # a larger matrix cannot be read


def write(
    out: Path, task: Task, predictions: Sequence[Prediction], table: Table, results: dict[str, Any]
) -> None:
    """The predictions, plots where there are classes, and the model's card.

    Warns where plots are left out for want of matplotlib.
    """
    write_predictions(out / PREDICTIONS, predictions, table)
    outcomes = task.outcomes(predictions, table)
    if outcomes is not None:
        try:
            plot(out, outcomes)
        except ModuleNotFoundError as error:
            warnings.warn(str(error), stacklevel=2)
    with replacing(out / "model" / "README.md") as (path,):
        path.write_text(_card(results), encoding="utf-8")


def write_predictions(path: Path, predictions: Sequence[Prediction], table: Table) -> None:
    """A line a row: where it stood, what was predicted and, as "gold", what its table says."""
    targets = [table.columns[role] for role in TARGETS if role in table.columns]
    with replacing(path) as (temporary,), temporary.open("w", encoding="utf-8") as file:
        for row, prediction in enumerate(predictions):
            line = {table.unit: int(table.numbers[row]), **prediction}
            if targets:
                line["gold"] = targets[0][row]
            file.write(json.dumps(line) + "\n")


def plot(out: Path, outcomes: Outcomes) -> None:
    """The confusion matrix and the reliability diagram (Guo et al., arXiv 1706.04599, figure 1).

    Raises ModuleNotFoundError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{CONFUSION} and {CALIBRATION} need matplotlib, which is not installed: "
            "pip install 'fastbert[plots]'"
        ) from None
    names = outcomes.names
    if len(names) <= _MOST_CLASSES:
        counts = confusion(outcomes.gold, outcomes.predicted, len(names))
        side = max(4.0, 0.45 * len(names) + 2)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center",
                      color=color, fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("right")
        with replacing(out / CONFUSION) as (path,):
            figure.savefig(path, format="png", dpi=120)
    rows, confidence, accuracy = reliability(
        outcomes.confidence, outcomes.gold == outcomes.predicted
    )
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    filled = rows > 0
    axes.scatter(confidence[filled], accuracy[filled], s=10 + 190 * rows[filled] / rows.max())
    axes.set_xlabel("probability of what was predicted")
    axes.set_ylabel("how often it was right")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    with replacing(out / CALIBRATION) as (path,):
        figure.savefig(path, format="png", dpi=120)


def _card(results: dict[str, Any]) -> str:
    """The README.md of a Hugging Face model."""
    data, setting = results["data"], results["setting"]
    lines = [
        "---", "tags: [bert, fine-tuning, fastbert]", "---", "",
        f"# BERT for {results['task']}", "",
        f"Fine-tuned ({results['method']}) on {data['train']['rows']:,} rows, "
        f"{setting['epochs']} epochs at {setting['learning_rate']:g}; of {len(results['seeds'])} "
        f"seeds the best by {results['selects']} on {data['dev']['rows']:,} development rows. "
        "`run.json` beside this folder says from what, and how.", "",
        "| rows | score | value | 95% interval |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in ("dev", "test"):
        for key, score in results.get(name, {}).items():
            lines.append(
                f"| {name} | {key} | {score['value']:.4f} | {score['low']:.4f} – "
                f"{score['high']:.4f} |"
            )
    return "\n".join([*lines, ""])
