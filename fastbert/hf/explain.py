"""explain: which path each part of an accelerated model takes, and why not a better one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastbert.hf.backbone import FusedBackbone
from fastbert.hf.dropin import left_parts, replacements, why_not
from fastbert.hf.families import Family, family_of
from fastbert.hf.heads import FusedTask
from fastbert.hf.parts import embeddings_obstacle
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
        lines = [self.columns, *(tuple(str(row[c]) for c in self.columns) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *text])

    __repr__ = __str__


class Explanation(Table):
    """What ``explain`` returns.

    rows: dicts of where (a module, or "device dtype" for an op), what (a class, a part or an op),
        takes ("packed", "original", "as it is" or a backend) and why (not a better one).
    """

    columns = _COLUMNS


def explain(model: nn.Module) -> Explanation:
    """Which path every part of ``model`` takes, and which backend each op, as things are now.

    Under autocast the dtype, and so the backend, is known only when the model is called; the rows
    are for the dtype of the parameters.
    Raises ValueError when no supported model is inside ``model``.
    """
    backbones = [(name, m, family_of(m)) for name, m in model.named_modules() if family_of(m)]
    if not backbones:
        raise ValueError(f"model: {type(model).__name__} holds no model that fastbert accelerates")
    rows: list[Row] = []
    for name, replacement in replacements(model):
        if isinstance(replacement, FusedTask):
            rows.append(_row(name, type(replacement.module).__name__, "packed", _skip(replacement)))
    for name, backbone, family in backbones:
        assert family is not None
        rows.extend(_backbone_rows(name, backbone, family))
    rows.extend(_collapsed(left_parts(model)))
    for name, replacement in replacements(model):
        for reason, count in replacement.fallbacks.items():
            rows.append(_row(name, reason, "original", f"{count} calls so far"))
    for kind, dtype, config in _kinds(backbones):
        rows.extend(_op_rows(kind, dtype, config))
    return Explanation(f"{type(model).__name__} ({', '.join(_names(backbones))})", rows)


def _row(where: str, what: str, takes: str, why: str = "") -> Row:
    return dict(zip(_COLUMNS, (where or "(the model)", what, takes, why), strict=True))


def _names(backbones: list[Any]) -> list[str]:
    return sorted({family.name for _, _, family in backbones})


def _skip(task: FusedTask) -> str:
    return "skip_logits: no vocabulary logits beside a loss" if task.skip_logits else ""


def _backbone_rows(name: str, backbone: Any, family: Family) -> Iterator[Row]:
    what = f"{type(backbone).__name__}, {len(family.layers(backbone))} layers"
    fused = backbone.__dict__.get("_fastbert")
    if not isinstance(fused, FusedBackbone):
        yield _row(name, what, "original", why_not(family, backbone) or "not accelerated")
        return
    reason = fused.refusal({})
    yield _row(name, what, "packed" if reason is None else "original", reason or "")
    obstacle = embeddings_obstacle(family, backbone)
    if obstacle is not None:
        yield _row(f"{name}.embeddings".lstrip("."), "embeddings", "original", obstacle)


def _collapsed(left: Iterator[tuple[str, str]]) -> Iterator[Row]:
    """One row a kind of part, with the layers that have it."""
    places: dict[str, list[str]] = {}
    for name, part in left:
        places.setdefault(part, []).append(name)
    for part, names in places.items():
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} layers)"
        yield _row(where, part, "as it is", "not fused, called as a module")


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
        passed_over = "; ".join(f"{b}: {why}" for b, why in choice["passed_over"].items())
        yield _row(where, choice["op"], choice["backend"] or "none", passed_over)
