"""Course: where a run is, and what it does there."""

from __future__ import annotations

import math

from fastbert.pretrain.options import Options
from fastbert.pretrain.setting import Progress, Setting
from fastbert.pretrain.stacking import GROWTH
from fastbert.train import SCHEDULES


class Course:
    """Phases, rates, batches and depth of a run, over its steps or its minutes.

    options: of the whole run; scaled to the setting's steps, if it has them.
    progress: where the run is; whoever runs it keeps this up.
    """

    def __init__(self, options: Options, setting: Setting) -> None:
        self.options = options if setting.steps is None else options.scaled(setting.steps)
        self.setting = setting
        self.progress = Progress()

    @property
    def part_done(self) -> float:
        """0 at the beginning of the run, 1 at its end."""
        if self.setting.steps is not None:
            return self.progress.step / self.setting.steps
        assert self.setting.minutes is not None
        return min(1.0, self.progress.seconds / (60 * self.setting.minutes))

    @property
    def seconds_left(self) -> float:
        """At the mean pace until now; infinite before the first step."""
        if not self.part_done:
            return math.inf
        return self.progress.seconds * (1.0 / self.part_done - 1.0)

    @property
    def place(self) -> float:
        """Where the run is in the steps of ``options``."""
        if self.setting.steps is not None:
            return float(self.progress.step)
        return self.part_done * self.options.total_steps

    @property
    def phase(self) -> int:
        return self._phase_and_step()[0]

    @property
    def layers(self) -> int | None:
        """That a run which grows is to have now; None for one that stays as it is."""
        stack = self.options.stack
        if not stack:
            return None
        return stack[sum(self.part_done >= begin for begin in GROWTH[len(stack)])]

    @property
    def learning_rate(self) -> float:
        """After warm-up and decay; a phase may have its own (its steps are then its whole)."""
        o = self.options
        number, step = self._phase_and_step()
        phase, schedule = o.phases[number], SCHEDULES[o.schedule]
        # The first update is made at the rate of step 1: at 0 it would be lost.
        if phase.learning_rate is not None or phase.warmup_steps is not None:
            rate = o.learning_rate if phase.learning_rate is None else phase.learning_rate
            return rate * schedule(step + 1, phase.warmup_steps or 0, phase.steps + 1)
        return o.learning_rate * schedule(self.place + 1, o.warmup_steps, o.total_steps + 1)

    @property
    def update_tokens(self) -> float:
        """Of the next update, in all processes."""
        o, phase = self.options, self.options.phases[self.phase]
        sequences: float = phase.batch
        if o.ramp_start is not None and o.ramp_steps:
            grown = min(1.0, self.place / o.ramp_steps)
            sequences = o.ramp_start + grown * (sequences - o.ramp_start)
        return sequences * phase.length

    def is_due(self, every: int) -> bool:
        """Whether what is done every so many steps, and in the end, is to be done now."""
        return self.progress.step % every == 0 or self.part_done >= 1.0

    def _phase_and_step(self) -> tuple[int, float]:
        """The phase, and the step in it."""
        step, last = self.place, len(self.options.phases) - 1
        for number, phase in enumerate(self.options.phases):
            if step < phase.steps or number == last:
                return number, step
            step -= phase.steps
        raise AssertionError("there is a phase")
