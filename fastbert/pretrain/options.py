"""Options: all that says how a model is pretrained, as plain data, to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.config import BertConfig
from fastbert.data import Corpus
from fastbert.pretrain.data import SOURCES, PretrainingData, open_source
from fastbert.pretrain.fields import fitted, made, names
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.objectives import Masks, Objective, parse
from fastbert.pretrain.segment_pairs import SegmentPairs
from fastbert.pretrain.sources import Segments
from fastbert.pretrain.stacking import GROWTH
from fastbert.train import SCHEDULES

OPTIMIZERS = ("adamw", "lamb")
_OF_PHASES = {"length", "batch"}  # what ``Options.changed`` changes in every phase
_SHORT = (SegmentPairs.name, Segments.name)  # the sources that may make short sequences


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with sequences of one length.

    length: of the sequences, at most, in tokens.  batch: sequences of that length in an update.
    max_predictions: of the masking in this phase.
    learning_rate, warmup_steps: where this phase warms up anew, to a peak of its own; None goes on
        with the run's schedule.
    """

    length: int
    steps: int
    batch: int
    max_predictions: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 8), ("steps", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {least} or more")

    @property
    def batch_tokens(self) -> int:
        """What ``TokenBatches`` takes as ``max_tokens`` for as many tokens in an update."""
        return self.length * self.batch


@dataclass(frozen=True)
class Options:
    """Everything about a run but its corpus, folder, seed and machine. The defaults are BERT's.

    objective, objective_options, masking: see ``fastbert.pretrain.objectives.parse`` and Masking.
    source, short, duplicates: see ``fastbert.pretrain.data.open_source``; short is for those
        sources that have it.  static: see PretrainingData.
    size: a preset of BertConfig (tiny, mini, small, medium, base, large), or a config.json.
    dropout: everywhere, in pretraining.
    phases: one after the other.
    stack: numbers of layers that the run grows through, such as (3, 6, 12), the last of them in
        place of what size says: see ``stack``.
    optimizer: ``adamw`` or ``lamb``; learning_rate, betas, eps, weight_decay, bias_correction and
        max_grad_norm (None: no clipping) are its arguments, see fastbert.train.
    warmup_steps, schedule: see fastbert.train.SCHEDULES.
    ramp_start, ramp_steps: the batch grows from ``ramp_start`` sequences to the phase's over so
        many steps; None for no ramp.
    Raises ValueError for what does not fit together.
    """

    objective: str = "mlm+nsp"
    objective_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    masking: Masking = Masking()
    source: str = "pairs"
    short: float = 0.1
    duplicates: int = 1
    static: bool = False
    size: str = "base"
    dropout: float = 0.1
    phases: tuple[Phase, ...] = (
        Phase(128, 900_000, 256, max_predictions=20),
        Phase(512, 100_000, 256, max_predictions=80),
    )
    stack: tuple[int, ...] = ()
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = False
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 10_000
    schedule: str = "linear"
    ramp_start: int | None = None
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("phases", tuple), ("stack", tuple), ("betas", tuple)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name, value, known in (
            ("source", self.source, SOURCES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if not self.phases:
            raise ValueError("phases: got none, expected one or more")
        if len(self.stack) not in GROWTH or any(layers < 1 for layers in self.stack):
            raise ValueError(
                f"stack: got {self.stack}, expected up to {max(GROWTH)} numbers of 1 or more"
            )
        if any(deep != 2 * flat for flat, deep in zip(self.stack, self.stack[1:], strict=False)):
            raise ValueError(f"stack: got {self.stack}, expected each to be twice the one before")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps: got {self.warmup_steps}, expected 0 .. {self.total_steps}, the "
                "steps of all phases"
            )
        self.objectives()

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def objectives(self, phase: Phase | None = None) -> tuple[Objective, ...]:
        """Those of a phase; all phases have the same heads."""
        masking = self.masking
        if phase is not None and phase.max_predictions is not None:
            masking = dataclasses.replace(masking, max_predictions=phase.max_predictions)
        return parse(self.objective, masking, self.objective_options)

    def config(self, vocab_size: int) -> BertConfig:
        """The model's, for a corpus's vocabulary."""
        longest = max(phase.length for phase in self.phases)
        changes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }
        if Path(self.size).suffix == ".json":
            config = BertConfig.from_json(self.size).replace(**changes)
        else:
            config = BertConfig.preset(
                self.size, max_position_embeddings=max(512, longest), **changes
            )
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"phases: got a length of {longest}, expected at most {self.size}'s "
                f"max_position_embeddings, {config.max_position_embeddings}"
            )
        return config

    def data(self, corpus: Corpus, phase: Phase, *, seed: int) -> PretrainingData:
        """The prepared examples of a phase."""
        objectives = self.objectives(phase)
        options = {"short": self.short} if self.source in _SHORT else {}
        source = open_source(
            self.source,
            corpus,
            phase.length,
            objectives,
            seed=seed,
            duplicates=self.duplicates,
            **options,
        )
        return PretrainingData(source, objectives, seed=seed, static=self.static)

    def changed(self, **changes: Any) -> Options:
        """With some fields changed, those of ``masking`` by their own names: ``rate=.4``; and
        ``length`` and ``batch``, which are those of every phase.

        What the phases have of their own goes along, or the change would be lost on them: their
        max_predictions in proportion to rate and length, their learning_rate to that of the run; a
        max_predictions by name takes the place of theirs. objective_options are added to those
        that there are.

        Raises ValueError for unknown names, values of another kind, and for a change of the masking
        where nothing masks.
        """
        own, masking = names(Options), names(Masking)
        if unknown := changes.keys() - own - masking - _OF_PHASES:
            known = ", ".join(sorted(own | masking | _OF_PHASES))
            raise ValueError(f"options: got {', '.join(sorted(unknown))}, expected some of {known}")
        inner = fitted(Masking, {k: x for k, x in changes.items() if k in masking})
        of_phases = fitted(Phase, {k: x for k, x in changes.items() if k in _OF_PHASES})
        outer = fitted(Options, {k: x for k, x in changes.items() if k in own})
        if inner:
            outer["masking"] = dataclasses.replace(outer.get("masking", self.masking), **inner)
        if "objective_options" in outer:
            added = {**self.objective_options}
            for name, fields in outer["objective_options"].items():
                added[name] = {**added.get(name, {}), **fields}
            outer["objective_options"] = added
        if "phases" not in outer:
            outer["phases"] = self._phases_with(of_phases, inner, outer)
        elif of_phases:
            raise ValueError(f"phases: got {', '.join(of_phases)} beside them, expected either")
        options = dataclasses.replace(self, **outer)
        if inner and not any(isinstance(objective, Masks) for objective in options.objectives()):
            raise ValueError(
                f"{', '.join(inner)}: {options.objective} masks nothing; its own options are "
                "objective_options"
            )
        return options

    def _phases_with(
        self, of_phases: Mapping[str, int], inner: Mapping[str, Any], outer: Mapping[str, Any]
    ) -> tuple[Phase, ...]:
        """The phases as ``changed`` has them.  inner: what changes of the masking.  outer: of all
        else."""
        rate = outer.get("masking", self.masking).rate / self.masking.rate
        phases = []
        for phase in self.phases:
            changes: dict[str, Any] = dict(of_phases)
            if "max_predictions" in inner:
                changes["max_predictions"] = None
            elif phase.max_predictions is not None:
                longer = of_phases.get("length", phase.length) / phase.length
                # Rounded up, but not for what floating point leaves behind 20.
                most = math.ceil(round(phase.max_predictions * rate * longer, 6))
                changes["max_predictions"] = most
            if phase.learning_rate is not None and "learning_rate" in outer:
                faster = outer["learning_rate"] / self.learning_rate
                changes["learning_rate"] = phase.learning_rate * faster
            phases.append(dataclasses.replace(phase, **changes))
        return tuple(phases)

    def scaled(self, steps: int) -> Options:
        """The same run in another number of steps: phases, warm-ups and ramp in proportion."""
        total = self.total_steps
        if steps < len(self.phases):
            raise ValueError(f"steps: got {steps}, expected {len(self.phases)} or more, a phase")

        def scale(count: int) -> int:
            return count * steps // total

        phases, done, before = [], 0, 0
        for number, phase in enumerate(self.phases):
            before += phase.steps
            left = len(self.phases) - number - 1  # each of these needs a step too
            end = min(max(before * steps // total, done + 1), steps - left)
            warmup = None if phase.warmup_steps is None else scale(phase.warmup_steps)
            phases.append(dataclasses.replace(phase, steps=end - done, warmup_steps=warmup))
            done = end
        return dataclasses.replace(
            self,
            phases=tuple(phases),
            warmup_steps=scale(self.warmup_steps),
            ramp_steps=scale(self.ramp_steps),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Raises ValueError for text that is no object of options."""
        try:
            values = json.loads(text)
            return made(cls, values)
        except (ValueError, TypeError) as error:  # TypeError: a phase without its length, say
            raise ValueError(f"options: {error}") from error


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """``name=value``s to what ``Options.changed`` takes. Values are JSON, or else a word as it is:

        optimizer=lamb   betas=[0.9,0.98]   masking.alpha=0.5   objective_options.rtd.divisor=4

    Raises ValueError for what is no such text, and for a name that comes twice.
    """
    changes: dict[str, Any] = {}
    of_objectives: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, equals, written = text.partition("=")
        first, *inner = path.split(".")
        try:
            value = json.loads(written)
        except ValueError:
            value = written
        if not equals or not all((first, *inner)):
            raise ValueError(f"set: got {text!r}, expected name=value, such as optimizer=lamb")
        place, name = changes, first
        if first == "masking" and len(inner) == 1:
            name = inner[0]
        elif first == "objective_options" and len(inner) == 2:
            place, name = of_objectives.setdefault(inner[0], {}), inner[1]
        elif inner:
            raise ValueError(
                f"set: got {path!r}, expected a name, masking.NAME or "
                "objective_options.OBJECTIVE.NAME"
            )
        if name in place:
            raise ValueError(f"set: got {path} twice")
        place[name] = value
    if of_objectives and "objective_options" in changes:
        raise ValueError("set: got objective_options both whole and in parts")
    return changes | ({"objective_options": of_objectives} if of_objectives else {})
