"""The losses of Hugging Face's task models, on packed rows.

Each equals the original's, with one difference of principle: padding takes no part. The originals
count a label that stands on padding unless it is -100, and let the logits of padding into the
softmax of question answering, so that the loss depends on how much padding a batch happens to have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.hf.families import Family, find
from fastbert.hf.parts import is_hooked
from fastbert.hf.tasks import Task, paths
from fastbert.nn.layer import is_plain_linear
from fastbert.ops import gather_rows, linear_cross_entropy, packed_layout

Tensor = torch.Tensor
IGNORED = -100


def classification(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Regression, single-label or multi-label loss of (B, C) logits.

    As in the original, ``config.problem_type`` is inferred from the labels once and then kept.
    """
    config, labels = model.config, labels.to(logits.device)
    if config.problem_type is None:
        if model.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "regression":
        if model.num_labels == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels)
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, model.num_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def spans(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean cross entropy of start and end over (B, S) logits; positions past S are ignored.

    Padding must hold the lowest number of the dtype, so that its probability is 0.
    """
    ignored = start.shape[1]
    positions = (p.squeeze(-1) if p.dim() > 1 else p for p in (starts, ends))
    losses = [
        F.cross_entropy(logits, p.to(logits.device).clamp(0, ignored), ignore_index=ignored)
        for logits, p in zip((start, end), positions, strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def replaced_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """ELECTRA's (T,) real-or-replaced logits."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def labelled_rows(model: Any, family: Family, task: Task, tokens: Tensor, labels: Tensor) -> Tensor:
    """The language-model loss from the rows that carry a label, without logits for the others.

    tokens: (T, H).  labels: (T,).  A decoder that is a plain Linear never makes its (M, V) logits
    either; anything else does, for those M rows. Finding the rows costs one wait for the device.
    """
    counts = labels != IGNORED
    if torch.compiler.is_compiling():
        index = packed_layout(counts[None])[0]
    else:
        index = counts.nonzero().flatten()
    rows, labels = gather_rows(tokens, index), labels[index]
    containers = (find(model, p[:n]) for p in paths(task.transform) for n in range(1, len(p)))
    splits = all(family.owns(m) and not is_hooked(m) for m in containers)
    decoder = find(model, tuple(task.decoder.split(".")))
    if splits and is_plain_linear(decoder):
        rows = run_steps(model, task.transform, rows)
        return linear_cross_entropy(rows, decoder.weight, decoder.bias, labels)
    return F.cross_entropy(run_steps(model, task.head, rows), labels)


def run_steps(model: Any, steps: tuple[Any, ...], x: Tensor) -> Tensor:
    """``x`` through the steps of a head, one after another."""
    for step in steps:
        x = find(model, tuple(step.split(".")))(x) if isinstance(step, str) else step(x)
    return x
