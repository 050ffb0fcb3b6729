"""A small grid of settings, tried one after another; trials that fall behind are given up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.finetune.setting import Setting

SEARCH = "search.json"
Grid = Mapping[str, Sequence[float]]

# (setting, folder, what to call with each evaluation's score and part of the run) -> best score
Trial = Callable[[Setting, Path, Callable[[float, float], None]], float]

_NAMES = ("learning_rate", "epochs", "batch", "warmup", "weight_decay", "dropout", "max_grad_norm")
_WHOLE = ("epochs", "batch")


class _Pruned(Exception):
    """A trial that is given up."""


def parse_grid(text: str, setting: Setting) -> dict[str, list[float]]:
    """``learning-rate=5e-5/1e-4,batch=16/32`` as numbers by the field of Setting; ``auto`` is half,
    once and twice the learning rate of ``setting``. Raises ValueError for anything else."""
    if text == "auto":
        assert setting.learning_rate is not None
        return {"learning_rate": [setting.learning_rate * x for x in (0.5, 1.0, 2.0)]}
    grid: dict[str, list[float]] = {}
    for part in text.split(","):
        name, _, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in _NAMES:
            raise ValueError(
                f"search: got {name!r}, expected auto, or name=value/value with some of "
                f"{', '.join(_NAMES)}, and commas between them"
            )
        kind = int if name in _WHOLE else float
        try:
            grid[name] = [kind(value) for value in values.split("/")]
        except ValueError:
            raise ValueError(f"search: {name}: got {values!r}, expected numbers: 1/2/3") from None
        for value in grid[name]:
            setting.replace(**{name: value})  # raises for numbers out of range
    return grid


def search(run: Trial, setting: Setting, grid: Grid, out: Path) -> Setting:
    """The best setting of ``grid``, by one run each of ``setting.seed``.

    A trial is given up where, at the same part of the run, it is below the median of those before
    it (optuna's MedianPruner). What each gave is in ``out / "search.json"``; called again, trials
    that it holds are not repeated.
    Raises ModuleNotFoundError without optuna.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "--search needs optuna, which is not installed: pip install 'fastbert[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GridSampler({k: list(v) for k, v in grid.items()}, seed=setting.seed)
    study = optuna.create_study(
        direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner(3)
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / SEARCH
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        study.add_trial(_known(optuna, grid, row))
    done = [row["setting"] for row in rows]
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        if chosen in done:
            continue
        study.enqueue_trial(chosen)
        trial = study.ask({k: optuna.distributions.CategoricalDistribution(v)
                           for k, v in grid.items()})  # fmt: skip
        row = _tried(run, trial, setting.replace(**chosen), out, len(rows))
        row["setting"] = chosen
        rows.append(row)
        state = "PRUNED" if row["given_up"] else "COMPLETE"
        study.tell(trial, None if row["given_up"] else row["score"],
                   state=optuna.trial.TrialState[state])  # fmt: skip
        with replacing(path) as (temporary,):
            temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    best = max((row for row in rows if not row["given_up"]), key=lambda row: row["score"])
    return setting.replace(**best["setting"])


def _tried(run: Trial, trial: Any, setting: Setting, out: Path, number: int) -> dict[str, Any]:
    seen: dict[str, float] = {}

    def look(score: float, part_done: float) -> None:
        percent = round(100 * part_done)
        seen[str(percent)] = score
        trial.report(score, percent)
        if part_done < 1.0 and trial.should_prune():
            raise _Pruned

    try:
        score = run(setting, out / f"trial-{number:02}", look)
    except _Pruned:
        return {"score": max(seen.values()), "given_up": True, "seen": seen}
    return {"score": score, "given_up": False, "seen": seen}


def _known(optuna: Any, grid: Grid, row: dict[str, Any]) -> Any:
    state = optuna.trial.TrialState
    return optuna.trial.create_trial(
        params=row["setting"],
        distributions={k: optuna.distributions.CategoricalDistribution(v) for k, v in grid.items()},
        intermediate_values={int(percent): score for percent, score in row["seen"].items()},
        value=None if row["given_up"] else row["score"],
        state=state.PRUNED if row["given_up"] else state.COMPLETE,
    )
