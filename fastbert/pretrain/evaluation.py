"""What a model makes of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.model import PretrainingModel

_SEED = 0  # of what is sampled: each evaluation of a run asks the same


@torch.no_grad()
def evaluate(
    model: PretrainingModel, batches: Iterable[PretrainingBatch], accelerator: Any
) -> dict[str, dict[str, float]]:
    """Of each summand of the loss, over all its targets in ``batches``: the mean loss, the part
    that is right beside the level of chance, and e to the loss, for masked tokens the perplexity.

    Leaves the model in eval mode, and torch's generators as they were: what comes behind an
    evaluation is the same as without it.
    """
    model.eval()
    sums: dict[str, list[float]] = {}
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        for batch in batches:
            with accelerator.autocast():
                output = model(batch.to(device), measure=True)
            for name, term in output.terms.items():
                row = sums.setdefault(name, [0.0] * 4)
                row[0] += float(term.total)
                row[1] += output.counts[name]
                row[2] += 0.0 if term.correct is None else float(term.correct)
                row[3] += 0.0 if term.chance is None else float(term.chance)
    found = {}
    for name, (total, count, correct, chance) in sums.items():
        count = max(1.0, count)
        found[name] = {
            "loss": total / count,
            "accuracy": correct / count,
            "chance": chance / count,
            "perplexity": math.exp(min(50.0, total / count)),
        }
    return found


def first_batches(lengths: Sequence[int], tokens: int, max_tokens: int) -> list[list[int]]:
    """The first examples, up to ``tokens`` in all but one at least, in batches of ``max_tokens``.

    lengths: of the examples.
    """
    batches: list[list[int]] = [[]]
    taken = held = 0
    for number, length in enumerate(lengths):
        if taken + length > tokens and taken:
            break
        if held + length > max_tokens and batches[-1]:
            batches.append([])
            held = 0
        batches[-1].append(number)
        taken, held = taken + length, held + length
    return batches
