"""Learning rates and batch sizes as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def linear(step: float, warmup_steps: float, total_steps: float) -> float:
    """step / warmup_steps up to 1, then down a line to 0 at total_steps, and 0 from there (Devlin
    et al., arXiv 1810.04805, appendix A.2)."""
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def cosine(step: float, warmup_steps: float, total_steps: float) -> float:
    """step / warmup_steps up to 1, then (1 + cos(pi t)) / 2, t from 0 to 1 at total_steps
    (Loshchilov, Hutter, arXiv 1608.03983, equation 5, without restarts)."""
    if step < warmup_steps:
        return step / warmup_steps
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * t))


def constant(step: float, warmup_steps: float, total_steps: float) -> float:
    """step / warmup_steps up to 1, and 1 from there."""
    return step / warmup_steps if step < warmup_steps else 1.0


def inverse_sqrt(step: float, warmup_steps: float, total_steps: float) -> float:
    """step / warmup_steps up to 1, then sqrt(warmup_steps / step) (Vaswani et al., arXiv
    1706.03762, equation 3, over its peak); a warm-up of 0 counts as one of 1."""
    if step < warmup_steps:
        return step / warmup_steps
    return math.sqrt(max(1, warmup_steps) / max(1, step))


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "inverse_sqrt": inverse_sqrt,
}


class Schedule(LRScheduler):
    """Sets each group's learning rate to its initial one times a function of ``SCHEDULES``.

    name: of the function.  warmup_steps, total_steps: in updates.
    The first update is number 0, so it has learning rate 0 under a warm-up, as in BERT's code.
    ``step()`` is called after every update. The state is the number of updates alone: a run may go
    on under another schedule, from the same place.
    """

    def __init__(
        self, optimizer: Optimizer, name: str, *, warmup_steps: int, total_steps: int
    ) -> None:
        if name not in SCHEDULES:
            raise ValueError(f"name: got {name!r}, expected one of {sorted(SCHEDULES)}")
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup_steps: got {warmup_steps}, expected 0 .. total_steps, {total_steps}"
            )
        self.name, self.warmup_steps, self.total_steps = name, warmup_steps, total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group now."""
        factor = SCHEDULES[self.name](self.last_epoch, self.warmup_steps, self.total_steps)
        return [float(base) * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, int]:
        """{"step": updates so far}."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to the step of ``state_dict`` and set the learning rates of that step."""
        self.last_epoch = state_dict["step"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def batch_size_ramp(step: int, *, start: int, end: int, ramp_steps: int, multiple: int = 1) -> int:
    """The batch size at ``step``: along a line from ``start`` at 0 to ``end`` at ``ramp_steps``,
    down to a multiple of ``multiple``, and ``end`` from there (Geiping, Goldstein, arXiv
    2212.14034, section 4.3).

    start, end: sequences or tokens, multiples of ``multiple``.
    """
    for name, value in (("start", start), ("end", end)):
        if value < 1 or value % multiple:
            raise ValueError(f"{name}: got {value}, expected a multiple of {multiple} from 1 on")
    if step >= ramp_steps:
        return end
    exact = start + (end - start) * step // ramp_steps
    return exact // multiple * multiple
