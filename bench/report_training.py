"""The README's tables of training: pretraining and fine-tuning beside their peers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def _percent(row: dict[str, Any]) -> str:
    """ "96.20 ± 0.35" of a mean and a deviation that are fractions."""
    deviation = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
    return f"{100 * row['mean']:.2f}{deviation}"


def _worst_loss(runs: list[dict[str, Any]]) -> str:
    """In points, the most of all seeds."""
    return f"{100 * max(run['int8_loss'] for run in runs):.2f}"


def pretraining(path: Path, table: Table, machine: Callable[[dict[str, Any]], str]) -> str:
    """``bench/pretraining.py``: so many minutes each."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            row["name"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['step']:,}",
            f"{row['perplexity']:.1f}",
            f"{100 * row['accuracy']:.1f}%",
        ]
        for row in result["rows"]
    ]
    headings = ("", "real tokens/s", "steps", "held-out perplexity", "right")
    said = (
        f"{result['minutes']:g} minutes each, size {result['size']}: "
        f"{result['tokens_per_s_ratio']:.2f}× the tokens, "
        f"{result['perplexity_ratio']:.3f}× the perplexity"
    )
    return f"{table(headings, rows)}\n\n{said}; {machine(result)}"


def finetune(path: Path, table: Table, machine: Callable[[dict[str, Any]], str]) -> str:
    """Scores and times of ``bench/finetune.py``."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in result["rows"]:
        names = [name for name in row["runs"] if name != "fastbert"]
        seeds, timed = len(row["runs"]["fastbert"]), "seconds" in row["fastbert"]
        rows.append(
            [
                row["set"],
                row["score"],
                "–" if row["bar"] is None else f"{100 * row['bar']:g}",
                _percent(row["fastbert"]),
                ", ".join(f"{name} {_percent(row[name])}" for name in names) or "–",
                f"{row['fastbert']['seconds']:.0f}" if timed else "–",
                f"{row['fastbert']['tokens_per_s']:,.0f}" if timed else "–",
                ", ".join(f"{row[n]['speedup']:.2f}× {n}" for n in names if timed) or "–",
                _worst_loss(row["runs"]["fastbert"]),
                str(seeds),
            ]
        )
    headings = ("set", "score", "bar", "fastbert", "peers", "s", "real tokens/s", "as fast as",
                "int8 loses", "seeds")  # fmt: skip
    where: dict[str, list[str]] = {}
    for row in result["rows"]:
        where.setdefault(machine(row), []).append(row["set"])
    said = [text if len(where) == 1 else f"{', '.join(sets)}: {text}"
            for text, sets in where.items()]  # fmt: skip
    return f"{table(headings, rows)}\n\n{result['model']}; {' '.join(said)}"


def methods(path: Path, table: Table, machine: Callable[[dict[str, Any]], str]) -> str:
    """A row a method of ``bench/methods.py``, a pair of columns a set."""
    result = json.loads(path.read_text(encoding="utf-8"))
    sets = list(dict.fromkeys(row["set"] for row in result["rows"]))
    found = {(row["set"], row["method"]): row for row in result["rows"]}
    lines = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = [f"`{method}`"]
        for name in sets:
            row = found.get((name, method))
            if row is None:
                cells += ["–", "–"]
                continue
            cells.append(f"{_percent(row)} ({row['seeds']})")
            missing = row["difference"] is None or method == "plain"
            cells.append("–" if missing else f"{100 * row['difference']:+.2f}")
        costs = [found[n, method]["cost"] for n in sets if (n, method) in found]
        known = [cost for cost in costs if cost is not None]
        cells.append(f"{sum(known) / len(known):.1f}×" if known else "–")
        lines.append(cells)
    headings = ["method"]
    for name in sets:
        headings += [f"{name} (seeds)", "over plain"]
    return f"{table([*headings, 'time'], lines)}\n\n{result['model']}; {machine(result)}"
