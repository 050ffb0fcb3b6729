"""What a model says of all the sequences of a data set, in the order of the data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.finetune.features import Features
from fastbert.finetune.tasks import Task
from fastbert.packed import PackedBatch

Array = np.ndarray
Tensor = torch.Tensor


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """``inputs`` with its tensors, and those of a PackedBatch, on ``device``."""
    return {
        name: x.to(device, non_blocking=True) if isinstance(x, Tensor | PackedBatch) else x
        for name, x in inputs.items()
    }


def batches_longest_first(lengths: Array, max_tokens: int) -> Iterator[Array]:
    """The numbers of all examples in batches of at most ``max_tokens`` tokens, or of one example
    that has more: the longest come first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        ends = np.cumsum(lengths[order[first:]])
        count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        yield order[first : first + count]
        first += count


@torch.inference_mode()
def run_model(
    model: nn.Module, task: Task, features: Features, max_tokens: int, device: torch.device
) -> list[Array]:
    """What ``task.split`` takes of the model's outputs, in eval mode, for each feature in order."""
    was_training = model.training
    model.eval()
    found: list[Any] = [None] * len(features)
    try:
        for index in batches_longest_first(features.lengths, max_tokens):
            inputs = to_device(task.collate([features[i] for i in index.tolist()]), device)
            parts = task.split(model(**inputs), inputs)
            for number, part in zip(index.tolist(), parts, strict=True):
                found[number] = part
    finally:
        model.train(was_training)
    return found
