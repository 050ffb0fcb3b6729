"""BART's noise: what is asked tells the text, and the rates are those that were asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.pretrain import Example, parse

from ._samples import CLS, MASK, SEP, asked, example, prepare


def undo(found: Example) -> list[int]:
    """The text again, from what is left of it and the answers to all questions but its order."""
    asked_of = {name: array.tolist() for name, array in found.targets["bart"].items()}
    size = len(found)
    missing = dict(zip(asked_of["length_index"], asked_of["lengths"], strict=True))
    spans: dict[int, dict[int, int]] = {}
    for place, offset, token in zip(
        asked_of["slot_index"], asked_of["offset"], asked_of["tokens"], strict=True
    ):
        spans.setdefault(place, {})[offset] = token
    inserted = dict(
        zip(asked_of.get("inserted_index", []), asked_of.get("inserted", []), strict=True)
    )
    parts: list[list[int]] = []
    for place, token in enumerate(found.ids.tolist()):
        own = [] if token in (CLS, SEP, MASK) or inserted.get(place) else [token]
        span = spans.get(place, {})
        assert len(span) == missing.get(place, 0) and sorted(span) == list(range(len(span)))
        parts.append(own + [span[i] for i in range(len(span))])
    (start,) = asked_of.get("start", [1])
    turned = [*parts[start : size - 1], *parts[1:start]]
    return sum([parts[0], *turned], [])


TEXTS = st.lists(st.tuples(st.integers(5, 29), st.booleans()), max_size=40)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.5, 1.0]),
       st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 1.0]), st.integers(0, 10**6))  # fmt: skip
def test_bart_can_be_undone(
    rows: list[tuple[int, bool]],
    rate: float,
    delete: float,
    insert: float,
    rotate: float,
    seed: int,
) -> None:
    """The answers to what is asked give the text back."""
    text = [token for token, _ in rows]
    sentence = np.cumsum([0, *(new for _, new in rows), 0])
    x = example([CLS, *text, SEP], sentence=sentence)
    noise = {"rate": rate, "delete": delete, "insert": insert, "rotate": rotate}
    found = prepare("bart", x, seed, bart={**noise, "permute": False})
    assert found.ids[0] == CLS and found.ids[-1] == SEP
    assert undo(found) == text
    permuted = prepare("bart", x, seed, bart=noise)
    assert sorted(undo(permuted)) == sorted(text)


@settings(deadline=None)
@given(TEXTS, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 1.0]), st.integers(0, 10**6))
def test_bart_order_can_be_undone(
    rows: list[tuple[int, bool]], insert: float, rotate: float, seed: int
) -> None:
    """Sentences begin where they are asked for their number, and their numbers sort them."""
    text = [token for token, _ in rows]
    sentence = np.cumsum([0, *(new for _, new in rows), 0])
    x = example([CLS, *text, SEP], sentence=sentence)
    noise = {"rate": 0.0, "insert": insert, "rotate": rotate, "sentences": 100}
    found = prepare("bart", x, seed, bart=noise)
    targets = asked(found, "bart")
    (start,) = targets.get("start", [1])
    inserted = dict(
        zip(targets.get("inserted_index", []), targets.get("inserted", []), strict=True)
    )
    number = dict(zip(targets["order_index"], targets["order"], strict=True))
    size = len(found)
    sentences: dict[int, list[int]] = {}
    here: list[int] = []
    for place in [*range(start, size - 1), *range(1, start)]:
        if inserted.get(place):
            continue
        if place in number:
            here = sentences.setdefault(number[place], [])
        here.append(int(found.ids[place]))
    assert sum((sentences[n] for n in sorted(sentences)), []) == text
    assert sorted(sentences) == list(range(len(sentences)))


def test_bart_statistics() -> None:
    """30% of the tokens go, in spans of Poisson(3), a [MASK] each; the order is any."""
    rng = np.random.default_rng(0)
    x = example([CLS, *rng.integers(5, 30, 510), SEP], sentence=[0, *np.arange(510) // 20, 0])
    lengths, firsts = [], Counter()
    for seed in range(400):
        found = prepare("bart", x, seed)
        targets = found.targets["bart"]
        assert len(targets["tokens"]) == round(0.3 * 510)
        assert (found.ids == MASK).sum() == len(targets["lengths"])
        assert np.array_equal(np.flatnonzero(found.ids == MASK), targets["length_index"])
        by_place = targets["lengths"]
        lengths.append(by_place[1:-1])
        firsts[int(targets["order"][0])] += 1
    counts = np.bincount(np.concatenate(lengths), minlength=11)
    factorial = np.cumprod([1, *range(1, 11)])
    p = np.exp(-3.0) * 3.0 ** np.arange(11) / factorial
    p[10] = 1 - p[:10].sum()
    total = counts.sum()
    # The last span drawn, which was cut, lies anywhere among the 50 or so: 2% of the lengths.
    assert (
        abs(counts - total * p)[:8] < 5 * np.sqrt(total * p[:8]) + 0.02 * total * p[:8] + 40
    ).all()
    assert len(firsts) == 26 and max(firsts.values()) < 400 / 26 + 5 * np.sqrt(400 / 26)


def test_bart_options() -> None:
    for noise, message in (
        ({"rate": 1.5}, "rate: got 1.5, expected 0 .. 1"),
        ({"delete": -0.1}, "delete: got -0.1"),
        ({"longest": 0}, "longest: got 0, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            parse("bart", None, {"bart": noise})
