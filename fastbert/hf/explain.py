"""explain: which path each part of an accelerated model takes, and why not a better one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastbert.hf.dropin import replacements, why_not
from fastbert.hf.families import family_of
from fastbert.hf.heads import FusedTask
from fastbert.hf.layer import FusedLayer
from fastbert.hf.replacement import Replacement
from fastbert.ops import choices

Row = dict[str, str]
_COLUMNS = ("where", "what", "takes", "why")


class Table:
    """Rows of text under fixed columns; ``str()`` aligns them."""

    columns: tuple[str, ...]

    def __init__(self, title: str, rows: list[dict[str, Any]]) -> None:
        self.title = title
        self.rows = rows

    def to_json(self) -> str:
        return json.dumps({"title": self.title, "rows": self.rows}, indent=2)

    def __str__(self) -> str:
        cells = ((_cell(row[column]) for column in self.columns) for row in self.rows)
        lines = [self.columns, *map(tuple, cells)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *text])

    __repr__ = __str__


def _cell(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


class Explanation(Table):
    """What ``explain`` returns.

    rows: dicts of where (a module, or "device dtype" for an op), what (a class, a part or an op),
        takes ("packed", "original", "as it is", "between graphs" or a backend) and why (not a
        better one).
    """

    columns = _COLUMNS


def explain(model: nn.Module) -> Explanation:
    """Which path every part of ``model`` takes, and which backend each op, as things are now.

    Under autocast the dtype, and so the backend, is known only when the model is called; the rows
    are for the dtype of the parameters.
    Raises ValueError when no supported model is inside ``model``.
    """
    backbones = [(n, m, f) for n, m in model.named_modules() if (f := family_of(m)) is not None]
    if not backbones:
        raise ValueError(f"model: {type(model).__name__} holds no model that fastbert accelerates")
    rows = [*_model_rows(model), *_layer_rows(model)]
    for name, backbone, family in backbones:
        if "_fastbert" not in backbone.__dict__:
            why = why_not(family, backbone) or "not accelerated"
            rows.append(_row(name, type(backbone).__name__, "original", why))
    for name, replacement in replacements(model):
        for reason, count in replacement.fallbacks.items():
            rows.append(_row(name, reason, "original", f"{count} calls so far"))
        for reason, count in replacement.breaks.items():
            rows.append(_row(name, reason, "between graphs", f"{count} compiled calls so far"))
    for kind, dtype, config in _kinds(backbones):
        rows.extend(_op_rows(kind, dtype, config))
    title = f"{type(model).__name__} ({', '.join(sorted({f.name for _, _, f in backbones}))})"
    return Explanation(f"{title}; backends for the dtype of the parameters, outside autocast", rows)


def _model_rows(model: nn.Module) -> Iterator[Row]:
    """Task models and bare models, and what of theirs is left alone."""
    for name, replacement in replacements(model):
        if isinstance(replacement, FusedLayer):
            continue
        reason = replacement.obstacle()
        takes = "packed" if reason is None else "original"
        what = type(replacement.module).__name__
        yield _row(name, what, takes, reason or _skip(replacement))
        for part in replacement.left():
            yield _row(name, part, "as it is")


def _layer_rows(model: nn.Module) -> Iterator[Row]:
    """One row for each thing that is left alone in some layers."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, replacement in replacements(model):
        if isinstance(replacement, FusedLayer):
            reason = replacement.obstacle()
            takes, left = "original", [reason] if reason else []
            if reason is None:
                takes, left = "as it is", replacement.left()
            for what in left:
                places.setdefault((what, takes), []).append(name)
    for (what, takes), names in places.items():
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} layers)"
        yield _row(where, what, takes)


def _row(where: str, what: str, takes: str, why: str = "") -> Row:
    return dict(zip(_COLUMNS, (where or "(the model)", what, takes, why), strict=True))


def _skip(replacement: Replacement) -> str:
    skips = isinstance(replacement, FusedTask) and replacement.skip_logits
    return "skip_logits: no vocabulary logits beside a loss" if skips else ""


def _kinds(backbones: list[Any]) -> Iterator[tuple[str, torch.dtype, Any]]:
    """Each device and dtype among the backbones, with the config of one that has it."""
    seen = set()
    for _, backbone, _ in backbones:
        parameter = next(backbone.parameters())
        kind = (parameter.device.type, parameter.dtype)
        if kind not in seen:
            seen.add(kind)
            yield (*kind, backbone.config)


def _op_rows(kind: str, dtype: torch.dtype, config: Any) -> Iterator[Row]:
    rows = ("add_layer_norm", "gather_rows", "scatter_rows")
    sizes = dict.fromkeys(rows, config.hidden_size)
    sizes["attention"] = config.hidden_size // config.num_attention_heads
    sizes["embed_layer_norm"] = getattr(config, "embedding_size", config.hidden_size)
    sizes["cross_entropy_rows"] = config.vocab_size
    # DistilBERT's name for it; the only size for which it has no common name.
    sizes["bias_gelu"] = getattr(config, "intermediate_size", None) or config.hidden_dim
    where = f"{kind} {str(dtype).removeprefix('torch.')}"
    for choice in choices(kind, dtype, sizes):
        if choice["op"] not in sizes:  # the int8 ops are no part of a float model
            continue
        passed_over = "; ".join(f"{b}: {why}" for b, why in choice["passed_over"].items())
        yield _row(where, choice["op"], choice["backend"] or "none", passed_over)
