"""FusedTask: what stands in for the forward of a task model (``BertForMaskedLM``, …).

One function a kind of task, not a class a model: the model's own head modules run on packed rows,
and only what the caller asked for is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.hf import inputs, losses
from fastbert.hf.backbone import Encoded, FusedBackbone, extra_outputs, output_class
from fastbert.hf.families import Family, find
from fastbert.hf.inputs import Request
from fastbert.hf.losses import run_steps
from fastbert.hf.parts import is_hooked, is_rowwise
from fastbert.hf.replacement import Replacement, bind
from fastbert.hf.tasks import TASKS, Task, paths
from fastbert.packed import PackedBatch

Tensor = torch.Tensor
Labels = dict[str, Tensor]

_LABELS = (
    "labels",
    "next_sentence_label",
    "sentence_order_label",
    "start_positions",
    "end_positions",
)


class FusedTask(Replacement):
    """Same arguments and outputs as the original forward.

    skip_logits: a language model that is given labels computes its loss from the labelled rows
        alone and returns None for the vocabulary logits.
    torch.compile traces it like the FusedBackbone.
    """

    def __init__(
        self, module: Any, name: str, strict: bool = False, skip_logits: bool = False
    ) -> None:
        super().__init__(module, TASKS[name][0], strict)
        self.task_name = name
        self.skip_logits = skip_logits

    @property
    def task(self) -> Task:
        return TASKS[self.task_name][1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        model: Any = self.module
        given = bind(model, args, kwargs)
        backbone = getattr(model, self.family.prefix)
        if torch.compiler.is_compiling():
            reason = inputs.graph_obstacle(self.family, backbone, given)
            if reason is not None:
                return self.between_graphs(reason, args, kwargs)
        labels = {n: x for n in _LABELS if (x := given.pop(n, None)) is not None}
        return_dict = given.pop("return_dict", None)
        choices = 0
        if self.task.kind == "multiple_choice":
            given, choices = _flatten_choices(given)
        reason = self.obstacle()
        if reason is not None:
            self.note(reason)
            return self.original(*args, **kwargs)
        if backbone.__dict__["forward"].refusal(given) is not None:
            return self.original(*args, **kwargs)  # the backbone counts it
        request = backbone.__dict__["forward"].read(given)
        encoded = backbone(request)
        call = _Call(model, self.family, self.task, request, encoded, labels, choices)
        fields = _KINDS[self.task.kind](call, self.skip_logits)
        fields.update(extra_outputs(backbone, request, encoded))
        output = output_class(self.family.module, self.task.output)(**fields)
        as_dict = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @torch.compiler.assume_constant_result
    def obstacle(self) -> str | None:
        """Why this model's head cannot read packed rows; None when it can."""
        family, task, model = self.family, self.task, self.module
        backbone: Any = getattr(model, family.prefix)
        fused = backbone.__dict__.get("forward")
        if not isinstance(fused, FusedBackbone) or not fused.active or is_hooked_outside(backbone):
            return f"{family.prefix} has hooks or a forward of its own"
        for path in (*paths(task.head), *paths(task.second[0])):
            for n in range(1, len(path)):
                container = find(model, path[:n])
                if not family.owns(container) or is_hooked(container):
                    return f"{'.'.join(path[:n])} has hooks or is not {family.name}'s own"
            head = find(model, path)
            if not is_rowwise(family, head):
                return f"{'.'.join(path)} is a {type(head).__name__}"
            if getattr(head, "summary_type", "first") != "first":
                return f"{'.'.join(path)} sums up {head.summary_type!r} tokens"
        return None


def is_hooked_outside(backbone: Any) -> bool:
    """True when hooks on the bare model expect its usual arguments and outputs."""
    return bool(
        backbone._forward_hooks
        or backbone._forward_pre_hooks
        or backbone._backward_hooks
        or backbone._backward_pre_hooks
    )


def _flatten_choices(given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(B, C, S) tensors as (B * C, S), and C."""
    sources = (given.get("input_ids"), given.get("inputs_embeds"))
    choices = next((x.shape[1] for x in sources if x is not None), 0)
    flat = {}
    for name, x in given.items():
        dims = 4 if name == "inputs_embeds" else 3
        is_nested = isinstance(x, Tensor) and x.dim() == dims
        flat[name] = x.reshape(-1, *x.shape[2:]) if is_nested else x
    return flat, choices


class _Call:
    """One forward of a task model: what its function in ``_KINDS`` works on."""

    def __init__(self, model: Any, family: Family, task: Task, request: Request,
                 encoded: Encoded, labels: Labels, choices: int) -> None:  # fmt: skip
        self.model = model
        self.family = family
        self.task = task
        self.request = request
        self.encoded = encoded
        self.given = labels
        self.choices = choices

    @property
    def batch(self) -> PackedBatch:
        return self.request.batch

    @property
    def labels(self) -> Tensor | None:
        return self.given.get("labels")

    def logits(self) -> Tensor:
        """The head on the rows that it takes: (T, …) for tokens, (B, …) for sequences."""
        takes, x = self.task.takes, self.encoded.tokens
        if takes == "pooled":
            x = self.pooled()
        elif takes != "tokens":
            x = self.batch.first(x)
        return run_steps(self.model, self.task.head, x[:, None] if takes == "sequence" else x)

    def pooled(self) -> Tensor:
        assert self.encoded.pooled is not None
        return self.encoded.pooled

    def token_labels(self) -> Tensor | None:
        """Labels of the real tokens, (T,)."""
        labels, shape = self.labels, self.batch.padded_shape
        if labels is None:
            return None
        if labels.numel() != shape[0] * shape[1]:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {shape}")
        return self.batch.pack(labels.to(self.encoded.tokens.device).view(shape))


Fields = dict[str, Any]


def _masked_lm(call: _Call, skip_logits: bool) -> Fields:
    labels = call.token_labels()
    if labels is not None and skip_logits:
        skipped = losses.labelled_rows(
            call.model, call.family, call.task, call.encoded.tokens, labels
        )
        return {"loss": skipped, "logits": None}
    logits = call.logits()
    loss = None if labels is None else F.cross_entropy(logits, labels)
    return {"loss": loss, "logits": call.batch.unpack(logits)}


def _pretraining(call: _Call, skip_logits: bool) -> Fields:
    steps, second_name, label_name = call.task.second
    second = run_steps(call.model, steps, call.pooled())
    second_labels = call.given.get(label_name)
    if second_labels is None:  # as in the original, a loss takes both labels
        call.given = {}
    first = _masked_lm(call, skip_logits)
    loss = first["loss"]
    if loss is not None:
        assert second_labels is not None
        labels = second_labels.to(second.device).view(-1)
        loss = loss + F.cross_entropy(second.view(-1, 2), labels)
    return {"loss": loss, "prediction_logits": first["logits"], second_name: second}


def _replaced_tokens(call: _Call, skip_logits: bool) -> Fields:
    logits, labels = call.logits(), call.token_labels()
    loss = None if labels is None else losses.replaced_tokens(logits, labels)
    return {"loss": loss, "logits": call.batch.unpack(logits)}


def _token_classification(call: _Call, skip_logits: bool) -> Fields:
    logits, labels = call.logits(), call.token_labels()
    loss = None if labels is None else F.cross_entropy(logits, labels)
    return {"loss": loss, "logits": call.batch.unpack(logits)}


def _next_sentence(call: _Call, skip_logits: bool) -> Fields:
    logits, labels = call.logits(), call.labels
    loss = None
    if labels is not None:
        loss = F.cross_entropy(logits.view(-1, 2), labels.to(logits.device).view(-1))
    return {"loss": loss, "logits": logits}


def _sequence_classification(call: _Call, skip_logits: bool) -> Fields:
    logits, labels = call.logits(), call.labels
    loss = None if labels is None else losses.classification(call.model, logits, labels)
    return {"loss": loss, "logits": logits}


def _multiple_choice(call: _Call, skip_logits: bool) -> Fields:
    """One row of choices a question; in a flattened batch, as many choices as the labels leave."""
    logits, labels, choices = call.logits(), call.labels, call.choices
    if call.batch.padded_shape[0] != call.batch.num_sequences:
        choices = 1 if labels is None else call.batch.num_sequences // labels.numel()
    logits = logits.view(-1, choices)
    loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
    return {"loss": loss, "logits": logits}


def _question_answering(call: _Call, skip_logits: bool) -> Fields:
    """Padding holds the lowest number of the dtype: no argmax falls on it, no softmax sees it.

    In a flattened batch each sequence has its own start and end, counted from its own first token.
    """
    logits, given = call.logits(), call.given
    lowest = torch.finfo(logits.dtype).min
    start, end = call.batch.unpack(logits, fill=lowest).unbind(-1)
    loss = None
    if "start_positions" in given and "end_positions" in given:
        rows = logits
        if call.batch.padded_shape[0] != call.batch.num_sequences:
            sequences = PackedBatch.from_flat(None, call.batch.lengths, inputs_embeds=rows)
            loss_start, loss_end = sequences.unpack(rows, fill=lowest).unbind(-1)
        else:
            loss_start, loss_end = start, end
        positions = (given["start_positions"], given["end_positions"])
        loss = losses.spans(loss_start, loss_end, *positions)
    return {"loss": loss, "start_logits": start.contiguous(), "end_logits": end.contiguous()}


_KINDS: dict[str, Callable[[_Call, bool], Fields]] = {
    "masked_lm": _masked_lm,
    "pretraining": _pretraining,
    "replaced_tokens": _replaced_tokens,
    "token_classification": _token_classification,
    "next_sentence": _next_sentence,
    "sequence_classification": _sequence_classification,
    "multiple_choice": _multiple_choice,
    "question_answering": _question_answering,
}
