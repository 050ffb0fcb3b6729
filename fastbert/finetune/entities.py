"""Entities in sequences of tags, as conlleval and seqeval count them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_TAG = re.compile(r"([BIESLU])-(.+)")
_SAME = {"L": "E", "U": "S"}  # BILOU's names of what IOBES calls E and S


class Entity(NamedTuple):
    """Words first .. end - 1 of a sentence."""

    kind: str
    first: int
    end: int


def has_entities(tags: Iterable[str]) -> bool:
    """Whether tags are O, B-X, I-X and the like, and some other than O."""
    different = set(tags)
    return len(different) > 1 and all(tag == "O" or _TAG.fullmatch(tag) for tag in different)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence in IOB1, IOB2, IOBES or BILOU.

    As in conlleval (Tjong Kim Sang and Buchholz, CoNLL-2000 shared task) and seqeval's default, a
    tag that does not fit begins an entity: a word goes on with the entity of the word before if its
    tag is I or E, that one's B or I, and their kinds are equal.
    """
    found: set[Entity] = set()
    first, before, kind = 0, "O", ""  # the entity that goes on, if ``before`` is not O
    for place, tag in enumerate((*tags, "O")):
        match = _TAG.fullmatch(tag)
        mark, new_kind = ("O", "") if match is None else match.groups()
        mark = _SAME.get(mark, mark)
        if mark in "IE" and before in "BI" and new_kind == kind:
            before = mark
            continue
        if before != "O":
            found.add(Entity(kind, first, place))
        first, before, kind = place, mark, new_kind
    return found
