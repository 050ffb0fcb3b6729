"""The objectives, and how ``mlm+nsp`` becomes a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastbert.pretrain.fields import made
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.objectives.boundary import SpanBoundary
from fastbert.pretrain.objectives.denoising import Denoising
from fastbert.pretrain.objectives.masked import MaskedLM, Masks
from fastbert.pretrain.objectives.objective import (
    ARRANGE,
    ASK,
    CORRUPT,
    Encoded,
    Objective,
    Targets,
    Term,
    binary_term,
    class_term,
    token_term,
)
from fastbert.pretrain.objectives.pairs import (
    NextSentence,
    Reordering,
    SentenceDistance,
    SentenceOrder,
    SequenceClass,
    ThreeWay,
)
from fastbert.pretrain.objectives.permutation import PermutationLM
from fastbert.pretrain.objectives.pseudo_masked import PseudoMaskedLM
from fastbert.pretrain.objectives.replaced import ReplacedTokens
from fastbert.pretrain.objectives.token_tasks import Capitalised, Elsewhere
from fastbert.pretrain.objectives.word_order import WordOrder

__all__ = [
    "ARRANGE",
    "ASK",
    "CORRUPT",
    "OBJECTIVES",
    "Encoded",
    "Masks",
    "Objective",
    "SequenceClass",
    "Targets",
    "Term",
    "binary_term",
    "class_term",
    "parse",
    "register",
    "token_term",
]

OBJECTIVES: dict[str, type[Objective]] = {}
"""By name; each has a ``paper`` and a ``summary``."""


def register(objective: type[Objective]) -> type[Objective]:
    """Make an objective known to ``parse``: a decorator for classes. Raises ValueError for a name
    that is taken."""
    if objective.name in OBJECTIVES:
        raise ValueError(f"objective: the name {objective.name!r} is taken")
    OBJECTIVES[objective.name] = objective
    return objective


for _objective in (
    MaskedLM,
    SpanBoundary,
    ReplacedTokens,
    PermutationLM,
    PseudoMaskedLM,
    Denoising,
    WordOrder,
    Capitalised,
    Elsewhere,
    NextSentence,
    SentenceOrder,
    ThreeWay,
    SentenceDistance,
    Reordering,
):
    register(_objective)


def parse(
    text: str,
    masking: Masking | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Objective, ...]:
    """``mlm+nsp`` to objectives, in the order in which they prepare an example.

    masking: of the one that masks; None leaves it its own default.
    options: fields of objectives by name: {"rtd": {"divisor": 3}}.
    Raises ValueError for names that are unknown or twice, objectives that do not go together, and
    bad options.
    """
    options = options or {}
    names = text.split("+")
    for name in (*names, *options):
        if name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective: got {name!r}, expected some of {known}, joined by +")
    found = []
    for name in names:
        kind = OBJECTIVES[name]
        fields = dict(options.get(name, {}))
        if masking is not None and issubclass(kind, Masks):
            fields["masking"] = masking
        try:
            found.append(made(kind, fields))
        except ValueError as error:
            raise ValueError(f"objective {name}: {error}") from error
    check_together(found)
    return tuple(sorted(found, key=lambda objective: (objective.stage, objective.name)))


def check_together(objectives: list[Objective]) -> None:
    """Raises ValueError if they cannot share one example."""
    names = [objective.name for objective in objectives]
    text = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"objective: {text} has one twice")
    corrupting = [o.name for o in objectives if o.stage == CORRUPT]
    if len(corrupting) > 1:
        raise ValueError(f"objective: {' and '.join(corrupting)} both corrupt the text")
    pairs = [o.name for o in objectives if o.relations]
    if len(pairs) > 1:
        raise ValueError(f"objective: {' and '.join(pairs)} both ask for pairs of segments")
    for objective in objectives:
        if objective.alone and len(objectives) > 1:
            raise ValueError(f"objective: {objective.name} goes with no other, got {text}")
        if objective.needs and not set(objective.needs) & set(names):
            needed = " or ".join(objective.needs)
            raise ValueError(f"objective: {objective.name} goes with {needed}, got {text}")
