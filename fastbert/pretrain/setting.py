"""Setting: what a run takes of the machine that it runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """What a run takes of the machine, and how often it looks up.

    steps, minutes: how long; one of them, the other None. By the clock, phases, warm-up and the
        rest keep their parts of the whole; the clock is that of training, evaluations aside.
    batch_tokens: what one process computes at once; an update accumulates as many of these as the
        options ask for.
    precision: "no", "bf16" or "fp16".  seed: of everything.  workers: processes that make batches;
        0 makes them in this one. The result does not depend on it.
    evaluate_every, save_every, log_every: steps.  evaluation_tokens: of the held-out text, at most.
    keep: checkpoints.  tracker: what else shows the log: see ``fastbert.train.logging``.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_tokens: int = 4096
    precision: str = "no"
    seed: int = 0
    workers: int = 1
    evaluate_every: int = 500
    evaluation_tokens: int = 100_000
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    tracker: str | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"steps, minutes: got {self.steps} and {self.minutes}, expected one of them"
            )
        for name in ("steps", "minutes", "batch_tokens", "evaluate_every", "evaluation_tokens",
                     "save_every", "log_every", "keep"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision: got {self.precision!r}, expected no, bf16 or fp16")


@dataclass
class Progress:
    """Where a run is: updates done, seconds that training has taken, tokens trained on."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
