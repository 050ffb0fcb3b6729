"""sensitivity: what each Linear and each layer costs when it alone is quantised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastbert.compress.batches import as_batches
from fastbert.hf.explain import Table
from fastbert.packed import PackedBatch

if TYPE_CHECKING:
    from fastbert.compress.quantize import Plan

Tensor = torch.Tensor
Row = dict[str, Any]


class Sensitivity(Table):
    """What ``sensitivity`` returns.

    rows: dicts of name (a Linear, or a layer: all its Linears at once), mean_error and max_error
        (1 - cosine of a token's last hidden state to that of the encoder in bf16), and score_lost,
        of ``evaluate``, None without it. Costliest first, layers before Linears.
    """

    columns = ("name", "mean_error", "max_error", "score_lost")


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: str = "int8-dynamic",
    *,
    tokenizer: Any = None,
    smooth_quant: float | None = 0.5,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Sensitivity:
    """The error of each Linear and each layer when that one is quantised and the rest is in bf16.

    model, tokenizer, smooth_quant: as in ``fastbert.quantize``.  batches: inputs as its
    ``calibration``; they give static scales, by "mse".  evaluate: model -> score, called once a
    row.
    """
    from fastbert.compress.quantize import Plan

    if scheme not in ("int8-dynamic", "int8-static"):
        raise ValueError(f"scheme: got {scheme!r}, expected int8-dynamic or int8-static")
    plan = Plan(model, scheme, tokenizer)
    packed = as_batches(batches, plan.facts)
    plan.prepare(packed, "mse", smooth_quant)
    rows = [*rank_layers(plan, packed), *_ranked(plan, packed, {n: [n] for n in plan.integer})]
    if evaluate is not None:
        before = float(evaluate(model))
        for row in rows:
            alone = [n for n in plan.integer if n == row["name"] or _layer(n) == row["name"]]
            row["score_lost"] = before - float(evaluate(plan.model(alone)))
    return Sensitivity(f"{type(model).__name__}, {scheme}: one at a time, the rest in bf16", rows)


def rank_layers(plan: Plan, batches: Collection[PackedBatch]) -> list[Row]:
    """Rows for the layers of ``plan``, costliest first."""
    groups: dict[str, list[str]] = {}
    for name in plan.integer:
        groups.setdefault(_layer(name), []).append(name)
    return _ranked(plan, batches, groups)


def _layer(linear: str) -> str:
    return linear.rpartition(".")[0]


def _ranked(
    plan: Plan, batches: Collection[PackedBatch], groups: dict[str, list[str]]
) -> list[Row]:
    exact = _outputs(plan, (), batches)
    rows: list[Row] = []
    for name, linears in groups.items():
        cosine = torch.cosine_similarity(exact, _outputs(plan, linears, batches), dim=1)
        error = 1 - cosine
        rows.append({
            "name": name,
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
            "score_lost": None,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["mean_error"])


def _outputs(plan: Plan, integer: Collection[str], batches: Iterable[PackedBatch]) -> Tensor:
    """The last hidden states of all tokens, float64, with these Linears in int8."""
    encoder = plan.encoder(integer)
    with torch.no_grad():
        return torch.cat([encoder(batch)[0].double() for batch in batches])
