"""verify: an accelerated model against itself restored, both against a float64 copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert.hf import losses
from fastbert.hf.dropin import replacements, restore
from fastbert.hf.explain import Table
from fastbert.hf.heads import FusedTask
from fastbert.hf.replacement import Replacement

Tensor = torch.Tensor
Inputs = Mapping[str, Tensor]

_SEQUENCES, _COLUMNS, _CHOICES = 4, 64, 2
_MASKED = 0.15  # of the tokens carry a language-model label (Devlin et al., arXiv 1810.04805, 3.1)
_SPAN_LABELS = ("start_positions", "end_positions")


class Report(Table):
    """What ``verify`` returns.

    rows: dicts of module, what ("output", "loss" or "gradient"), name (the same parameter of all
        layers is one row), error and original (max abs error of the accelerated and of the restored
        model against float64), limit and ok.
    """

    columns = ("module", "what", "name", "error", "original", "limit", "ok")

    @property
    def ok(self) -> bool:
        return all(row["ok"] for row in self.rows)


def verify(model: nn.Module, *, inputs: Inputs | None = None, seed: int = 0) -> Report:
    """Outputs, loss and every parameter's gradient of the accelerated models inside ``model``.

    inputs: keyword arguments of the accelerated model, labels among them if wanted; None makes a
        batch of random tokens and lengths, padded on the right, with labels for the task.
    seed: of those random inputs.

    Three runs in eval mode: accelerated, restored (the same parameters), and a restored copy in
    float64, the oracle. For each tensor, over real tokens only,
    ``max |ours - oracle| <= 2 max |original - oracle| + (4 eps + 32 eps') (max |oracle| + G)``
    with eps of the model's dtype, eps' of the dtype that sums run in (float32, float64 for float64)
    and G the largest gradient of all (0 for outputs and losses). What is zero in exact arithmetic,
    such as the gradient of a key bias, is thereby held to the rounding of its neighbours, and what
    hangs on one outlier channel, as in real checkpoints' LayerNorms, does not fail by chance.
    Question answering is compared with padding left out of the softmax on all sides. Inputs of
    your own with padding on the left, or with labels on padding, show where fastbert differs from
    the original on purpose (see accelerate).

    The model is left as it was. The copy takes 8 bytes a parameter, its gradients as much again.
    Raises ValueError when nothing inside ``model`` is accelerated.
    """
    found = list(_outermost(model))
    if not found:
        raise ValueError(
            f"model: nothing inside {type(model).__name__} is accelerated; "
            "call fastbert.accelerate first"
        )
    rows: list[dict[str, Any]] = []
    for name, replacement in found:
        call = dict(inputs) if inputs is not None else _example(replacement, seed)
        rows.extend({"module": name or "(the model)", **row} for row in _compare(replacement, call))
    report = Report("", rows)
    failed = sum(not row["ok"] for row in rows)
    report.title = f"{type(model).__name__}: " + (f"{failed} rows failed" if failed else "ok")
    return report


def _outermost(model: nn.Module) -> Iterator[tuple[str, Replacement]]:
    """The accelerated models that lie in no other accelerated model."""
    inside: set[int] = set()
    for name, replacement in replacements(model):
        if id(replacement.module) not in inside:
            yield name, replacement
            inside.update(map(id, replacement.module.modules()))


# --- three runs ---------------------------------------------------------------------------------


class _Run(NamedTuple):
    outputs: dict[str, Tensor]
    loss: Tensor | None
    gradients: dict[str, Tensor]


def _compare(replacement: Replacement, call: Inputs) -> Iterator[dict[str, Any]]:
    module = replacement.module
    kind = replacement.task.kind if isinstance(replacement, FusedTask) else ""
    oracle_module = restore(copy.deepcopy(module)).double()
    with _left_as_it_was(module):
        ours = _run(module, call, kind, fused=True)
        with _suspended(module):
            original = _run(module, call, kind, fused=False)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    oracle = _run(oracle_module.eval(), wide, kind, fused=False)
    dtype = next(module.parameters()).dtype

    for name, expected in oracle.outputs.items():
        if name not in ours.outputs:  # skip_logits
            continue
        error = _Errors().add(ours.outputs[name], original.outputs[name], expected)
        yield error.row("output", name, dtype)
    if oracle.loss is not None and ours.loss is not None and original.loss is not None:
        yield _Errors().add(ours.loss, original.loss, oracle.loss).row("loss", "loss", dtype)
    groups: dict[str, _Errors] = {}
    for name, expected in oracle.gradients.items():
        group = groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), _Errors())
        group.add(ours.gradients[name], original.gradients[name], expected)
    largest = max((group.size for group in groups.values()), default=0.0)
    for name, group in groups.items():
        yield group.row("gradient", name, dtype, largest)


class _Errors:
    """Largest errors, and largest element of the oracle, over some tensors."""

    def __init__(self) -> None:
        self.ours = self.original = self.size = 0.0

    def add(self, ours: Tensor, original: Tensor, oracle: Tensor) -> _Errors:
        self.ours = _larger(self.ours, ours.double() - oracle)
        self.original = _larger(self.original, original.double() - oracle)
        self.size = _larger(self.size, oracle)
        return self

    def row(self, what: str, name: str, dtype: torch.dtype, largest: float = 0.0) -> dict[str, Any]:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        rounding = 4 * torch.finfo(dtype).eps + 32 * torch.finfo(sums).eps
        limit = 2 * self.original + rounding * (self.size + largest)
        return {"what": what, "name": name, "error": self.ours, "original": self.original,
                "limit": limit, "ok": self.ours <= limit}  # fmt: skip


def _larger(value: float, x: Tensor) -> float:
    """max(value, max |x|); nan stays."""
    other = float(x.abs().max()) if x.numel() else 0.0
    return other if other > value or other != other else value


def _run(module: nn.Module, call: Inputs, kind: str, fused: bool) -> _Run:
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    call, spans = dict(call), None
    if kind == "question_answering" and not fused and all(n in call for n in _SPAN_LABELS):
        spans = [call.pop(n) for n in _SPAN_LABELS]
    result = module(**call, return_dict=True)
    mask = call.get("attention_mask")
    outputs = {n: x for n, x in result.items() if isinstance(x, Tensor) and n != "loss"}
    loss = result.get("loss")
    if spans is not None:
        lowest = torch.finfo(result.start_logits.dtype).min
        pair = [result[n] for n in ("start_logits", "end_logits")]
        if mask is not None:
            pair = [x.masked_fill(mask == 0, lowest) for x in pair]
        loss = losses.spans(*pair, *spans)
    if mask is not None and mask.dim() == 2:
        for name in _per_token(kind):
            if name in outputs:
                outputs[name] = outputs[name][mask != 0]
    objective: Any = loss if loss is not None else sum(map(_projection, outputs.values()))
    if parameters:
        objective.backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()
    }
    outputs = {n: x.detach() for n, x in outputs.items()}
    return _Run(outputs, None if loss is None else loss.detach(), gradients)


def _per_token(kind: str) -> tuple[str, ...]:
    per_sequence = ("sequence_classification", "next_sentence", "multiple_choice")
    names = ("last_hidden_state", "prediction_logits", "start_logits", "end_logits")
    return names if kind in per_sequence else (*names, "logits")


def _projection(x: Tensor) -> Tensor:
    """A scalar that every element of ``x`` moves, each with its own weight."""
    weights = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float64).cos()
    return (x.double().flatten() * weights).sum() / max(1, x.numel()) ** 0.5


@contextmanager
def _suspended(module: nn.Module) -> Iterator[None]:
    """Inside, every accelerated module runs its own forward."""
    found = [replacement for _, replacement in replacements(module)]
    for replacement in found:
        replacement.active = False
    try:
        yield
    finally:
        for replacement in found:
            replacement.active = True


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, gradients and an inferred problem_type as before afterwards."""
    modes = {m: m.training for m in module.modules()}
    gradients = {p: p.grad for p in module.parameters()}
    config: Any = getattr(module, "config", None)
    problem = getattr(config, "problem_type", None)
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for p, gradient in gradients.items():
            p.grad = gradient
        if config is not None and hasattr(config, "problem_type"):
            config.problem_type = problem


# --- inputs -------------------------------------------------------------------------------------


def _example(replacement: Replacement, seed: int) -> dict[str, Tensor]:
    """A batch of random lengths for a model, one of them the longest, with labels for its task."""
    model: Any = replacement.module
    config, device = model.config, next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    kind = replacement.task.kind if isinstance(replacement, FusedTask) else ""
    pad = config.pad_token_id or 0
    first = pad + 1 if replacement.family.positions_from_padding else 0
    columns = min(_COLUMNS, config.max_position_embeddings - first)
    rows = _SEQUENCES * (_CHOICES if kind == "multiple_choice" else 1)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = integers(1, columns + 1, rows)
    lengths[0] = columns
    mask = torch.arange(columns) < lengths[:, None]
    ids = integers(0, config.vocab_size - 1, rows, columns)
    ids = torch.where(mask, ids + (ids >= pad), pad)  # any id but the padding's
    call = {"input_ids": ids, "attention_mask": mask.long()}
    if kind in ("masked_lm", "pretraining"):
        chosen = mask & (torch.rand(mask.shape, generator=generator) < _MASKED)
        chosen[:, 0] = True
        call["labels"] = torch.where(chosen, ids, losses.IGNORED)
        if isinstance(replacement, FusedTask) and kind == "pretraining":
            call[replacement.task.second[2]] = integers(0, 2, rows)
    elif kind == "replaced_tokens":
        call["labels"] = integers(0, 2, rows, columns)
    elif kind == "token_classification":
        labels = integers(0, model.num_labels, rows, columns)
        call["labels"] = torch.where(mask, labels, losses.IGNORED)
    elif kind == "question_answering":
        for name in _SPAN_LABELS:
            call[name] = (torch.rand(rows, generator=generator) * lengths).long()
    elif kind == "multiple_choice":
        call = {n: x.view(_SEQUENCES, _CHOICES, columns) for n, x in call.items()}
        call["labels"] = integers(0, _CHOICES, _SEQUENCES)
    elif kind == "next_sentence":
        call["labels"] = integers(0, 2, rows)
    elif kind == "sequence_classification":
        call["labels"] = _class_labels(model, rows, generator)
    return {name: x.to(device) for name, x in call.items()}


def _class_labels(model: Any, rows: int, generator: torch.Generator) -> Tensor:
    dtype, problem = next(model.parameters()).dtype, model.config.problem_type
    if problem == "regression" or (problem is None and model.num_labels == 1):
        shape = (rows,) if model.num_labels == 1 else (rows, model.num_labels)
        return torch.rand(shape, generator=generator).to(dtype)
    if problem == "multi_label_classification":
        return torch.randint(0, 2, (rows, model.num_labels), generator=generator).to(dtype)
    return torch.randint(0, model.num_labels, (rows,), generator=generator)
