"""The losses of the task heads, Hugging Face's, with their labels checked.

Means over what counts, in fp32 at least; nan when nothing counts, as in torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.config import BertConfig
from fastbert.nn.heads import IGNORED, wide
from fastbert.ops._check import describe

Tensor = torch.Tensor


def _check_labels(name: str, labels: Tensor, rows: Tensor) -> None:
    """``labels`` are one whole number a row, on the device of the rows."""
    if labels.is_floating_point() or labels.numel() != len(rows) or labels.device != rows.device:
        raise ValueError(
            f"{name}: got {describe(labels)}, expected {len(rows)} whole numbers on {rows.device}"
        )


def class_labels(name: str, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
    """A label for each of M ``rows`` as (M,) int64, each 0 .. classes - 1 or IGNORED.

    The range is looked at on CPU only, where looking waits for nothing.
    """
    _check_labels(name, labels, rows)
    labels = labels.reshape(-1).long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(
                f"{name}: got {int(wrong[0])}, expected 0 .. {classes - 1}, or {IGNORED} for none"
            )
    return labels


def class_loss(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (M, C) and M labels, without those that are IGNORED."""
    labels = class_labels(name, labels, logits, logits.shape[1])
    return F.cross_entropy(wide(logits), labels, ignore_index=IGNORED)


def sequence_loss(config: BertConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that ``problem_type`` names or, as in Hugging Face, that the labels call for: one
    label is a regression, whole numbers are classes, floats are several classes at once."""
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        several = labels.is_floating_point()
        problem = "multi_label_classification" if several else "single_label_classification"
    if problem == "single_label_classification":
        return class_loss("labels", logits, labels)
    logits = wide(logits)
    if labels.numel() != logits.numel() or labels.device != logits.device:
        shape = f"{tuple(logits.shape)} on {logits.device}"
        raise ValueError(f"labels: got {describe(labels)}, expected {shape} for {problem}")
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(padded_logits: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """Cross entropy over the real tokens of each row; a position that is none does not count.

    padded_logits: (B, S), lowest at padding.  real: (B, S), 1 at tokens and 0 at padding.
    positions: (B,) columns, clamped to 0 .. S as in Hugging Face.
    """
    _check_labels("start_positions, end_positions", positions, padded_logits)
    columns = positions.reshape(-1, 1).long().clamp(0, padded_logits.shape[1])
    counts = F.pad(real, (0, 1)).gather(1, columns) != 0
    targets = torch.where(counts, columns, IGNORED)[:, 0]
    return F.cross_entropy(wide(padded_logits), targets, ignore_index=IGNORED)
