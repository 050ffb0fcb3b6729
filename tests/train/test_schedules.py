"""Schedules at steps computed by hand, resumed, and the ramp of the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastbert.train import SCHEDULES, AdamW, Schedule, batch_size_ramp

# name -> {step: factor} for a warm-up of 4 in 12 steps.
BY_HAND = {
    "linear": {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0.0, 99: 0.0},
    "cosine": {0: 0.0, 2: 0.5, 4: 1.0, 6: 0.5 + math.sqrt(0.125), 8: 0.5, 12: 0.0, 99: 0.0},
    "constant": {0: 0.0, 2: 0.5, 4: 1.0, 12: 1.0, 99: 1.0},
    "inverse_sqrt": {0: 0.0, 2: 0.5, 4: 1.0, 9: 2 / 3, 16: 0.5, 100: 0.2},
}


def test_every_schedule_is_here() -> None:
    assert BY_HAND.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_hand(name: str) -> None:
    for step, factor in BY_HAND[name].items():
        assert SCHEDULES[name](step, 4, 12) == pytest.approx(factor, abs=1e-12), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_and_without_steps(name: str) -> None:
    assert SCHEDULES[name](0, 0, 10) == 1.0
    assert 0.0 <= SCHEDULES[name](5, 5, 5) <= 1.0


def optimizer() -> AdamW:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    return AdamW([{"params": [p]}, {"params": [q], "lr_scale": 0.5}], lr=0.1)


def rates(schedule: Schedule, steps: int) -> list[list[float]]:
    """The groups' learning rates at each of the next updates."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_scheduler_sets_every_group() -> None:
    schedule = Schedule(optimizer(), "linear", warmup_steps=4, total_steps=12)
    for step, (first, second) in enumerate(rates(schedule, 13)):
        factor = SCHEDULES["linear"](step, 4, 12)
        assert (first, second) == (0.1 * factor, 0.05 * factor)


def test_resumed() -> None:
    expected = rates(Schedule(optimizer(), "cosine", warmup_steps=2, total_steps=10), 10)
    first = Schedule(optimizer(), "cosine", warmup_steps=2, total_steps=10)
    rates(first, 4)
    second = Schedule(optimizer(), "cosine", warmup_steps=2, total_steps=10)
    second.load_state_dict(first.state_dict())
    assert rates(second, 6) == expected[4:]
    # Another schedule goes on from the same place.
    third = Schedule(optimizer(), "constant", warmup_steps=2, total_steps=20)
    third.load_state_dict(first.state_dict())
    assert rates(third, 1) == [[0.1, 0.05]]
    assert first.state_dict() == {"step": 4}


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    """What a recorded graph reads."""
    adamw = optimizer()
    rate = adamw.param_groups[0]["lr"] = torch.tensor(0.1)
    schedule = Schedule(adamw, "linear", warmup_steps=0, total_steps=4)
    adamw.step()
    schedule.step()
    assert adamw.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.075)
    schedule.load_state_dict({"step": 2})
    assert adamw.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.05)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="^name: got 'step', expected one of"):
        Schedule(optimizer(), "step", warmup_steps=0, total_steps=1)
    with pytest.raises(ValueError, match="^warmup_steps: got 5, expected 0 .. total_steps, 4"):
        Schedule(optimizer(), "linear", warmup_steps=5, total_steps=4)
    with pytest.raises(ValueError, match="^end: got 30, expected a multiple of 8"):
        batch_size_ramp(0, start=8, end=30, ramp_steps=4, multiple=8)
    with pytest.raises(ValueError, match="^start: got 0"):
        batch_size_ramp(0, start=0, end=32, ramp_steps=4)


def test_batch_size_ramp() -> None:
    sizes = [batch_size_ramp(s, start=8, end=32, ramp_steps=6, multiple=8) for s in range(8)]
    assert sizes == [8, 8, 16, 16, 24, 24, 32, 32]  # exactly 8, 12, 16, 20, 24, 28, 32
    down = [batch_size_ramp(s, start=4, end=1, ramp_steps=3) for s in range(5)]
    assert down == [4, 3, 2, 1, 1]
    assert batch_size_ramp(0, start=8, end=32, ramp_steps=0, multiple=8) == 32
