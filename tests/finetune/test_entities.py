"""Entities by hand, in every scheme, and as conlleval reads tags that do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.finetune.entities import entities, has_entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB2
        ("I-PER I-PER B-PER O I-LOC", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5)]),  # IOB1
        ("B-PER E-PER S-LOC S-LOC", [("PER", 0, 2), ("LOC", 2, 3), ("LOC", 3, 4)]),  # IOBES
        ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),  # BILOU
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),  # another kind begins one
        ("O I-PER O", [("PER", 1, 2)]),
        ("E-PER I-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # nothing goes on after an end
        ("S-PER E-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
        ("", []),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == set(expected)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["U-PER", "O", "L-LOC"], True),
        (["O"], False),
        (["NOUN", "VERB"], False),
        (["B", "I", "O"], False),
        (["O", "B-PER", "NOUN"], False),
    ],
)
def test_has_entities(tags: list[str], expected: bool) -> None:
    assert has_entities(tags) is expected


def by_conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """What conlleval's two tables, of where a chunk ends and where one starts, say."""
    ends = {"B": "BSO", "I": "BSO", "E": "BIESO", "S": "BIESO", "O": ""}
    starts = {"B": "BS", "I": "BS", "E": "BSEI", "S": "BSEI", "O": "BSEI"}
    found, open_at = set(), -1
    before, kind = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, new_kind = tag.partition("-")
        changes = kind != new_kind
        if before != "O" and (mark in ends[before] or changes):
            found.add((kind, open_at, place))
        if mark != "O" and (mark in starts[before] or changes):
            open_at = place
        before, kind = mark, new_kind
    return found


marks = st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "XY")])


@given(st.lists(marks, max_size=8))
def test_entities_are_conllevals(tags: list[str]) -> None:
    assert entities(tags) == by_conlleval(tags)
