"""Masking: the statistics of every strategy over a million tokens, and what holds for every one.

Counts are compared with their expectation by their binomial standard deviation. Five of these, over
hundreds of counts, are exceeded by chance once in thousands of runs; and the seeds are fixed.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.pretrain import Example, Masking
from fastbert.pretrain.examples import NONE
from fastbert.pretrain.masking import WHAT
from fastbert.pretrain.spans import place_spans, random_spans, span_lengths

from ._samples import CLS, MASK, SEP, SPECIAL, UNK, Array, example, vocabulary

S, EXAMPLES = 512, 2000  # a million tokens
V = 1000
PIECES = 700  # ids from here on continue words
RNG = np.random.default_rng(20)
IDS = RNG.integers(5, V, (EXAMPLES, S))
IDS[:, 0], IDS[:, -1] = CLS, SEP
WORDS, FLAT = vocabulary(V, pieces_from=PIECES), vocabulary(V)


def within(count: Array | float, total: float, p: Array | float, sigmas: float = 5.0) -> bool:
    """``count`` of ``total`` is what probability ``p`` may give."""
    bound = sigmas * np.sqrt(total * np.asarray(p) * (1 - np.asarray(p)))
    return bool(np.all(np.abs(count - total * np.asarray(p)) <= bound))


def examples(pieces: bool, **columns: object) -> list[Example]:
    starts = [(WORDS if pieces else FLAT).word_starts[ids] for ids in IDS]
    return [example(ids, starts=s, **columns) for ids, s in zip(IDS, starts, strict=True)]


def choose(masking: Masking, made: list[Example], seed: int = 0) -> Array:
    """(examples, S)"""
    rng = np.random.default_rng(seed)
    return np.stack([masking.choose(x, WORDS, rng) for x in made])


@pytest.mark.parametrize("rate", [0.10, 0.15, 0.25, 0.40, 0.50])
def test_tokens(rate: float) -> None:
    """n of each sequence, every place alike."""
    chosen = choose(Masking(rate=rate), examples(pieces=False)) != NONE
    assert (chosen.sum(1) == round(rate * S)).all()
    assert not chosen[:, [0, -1]].any()
    assert within(chosen[:, 1:-1].sum(0), EXAMPLES, round(rate * S) / (S - 2))
    pairs = (chosen[:, 1:-2] & chosen[:, 2:-1]).sum()  # neighbours do not know of each other
    n, places = round(rate * S), S - 2
    assert within(pairs, EXAMPLES * (places - 1), n * (n - 1) / places / (places - 1))


@pytest.mark.parametrize("per", ["token", "group"])
@pytest.mark.parametrize("replace_by", [(0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0.85, 0.0, 0.15)])
def test_replacement(per: str, replace_by: tuple[float, float, float]) -> None:
    """80/10/10, [MASK] only, ELECTRA's 85%: of the tokens, or of the groups, all of one kind."""
    masking = Masking(what="span", rate=0.3, replace=replace_by, per=per)
    rng = np.random.default_rng(1)
    group = choose(masking, examples(pieces=False))
    new = np.stack([masking.corrupt(i, g, FLAT, rng) for i, g in zip(IDS, group, strict=True)])
    taken = group != NONE
    assert np.array_equal(new[~taken], IDS[~taken])
    masked, kept = taken & (new == MASK), taken & (new == IDS)
    replaced = taken & ~masked & ~kept
    masks, randoms, keeps = replace_by
    same = randoms / (V - 5)  # a random token is the old one by chance
    expected = ((masked, masks), (replaced, randoms - same), (kept, keeps + same))
    if per == "token":
        for where, p in expected:
            assert within(where.sum(), taken.sum(), p)
    else:
        spans = (np.arange(EXAMPLES)[:, None] * S + group)[taken]
        number = np.unique(spans, return_inverse=True)[1]
        size, masked_of, kept_of = (
            np.bincount(number, weights=where[taken]) for where in (taken, masked, kept)
        )
        assert np.isin(masked_of / size, (0, 1)).all()
        long = size >= 4  # three of four random tokens are not the old ones by chance
        assert ((kept_of == size) | (kept_of <= 1))[long].all()
        kind = np.where(masked_of == size, 0, np.where(kept_of == size, 2, 1))[long]
        for drawn, p in zip(np.bincount(kind, minlength=3), replace_by, strict=True):
            assert within(drawn, len(kind), p)
    if replaced.any():
        counts = np.bincount(new[replaced], minlength=V)
        assert not counts[list(SPECIAL)].any()
        assert within(counts[5:], replaced.sum(), 1 / (V - 5))


def test_words() -> None:
    """All pieces of a word or none; n tokens, as words of one piece are never used up."""
    made = examples(pieces=True)
    chosen = choose(Masking(what="word"), made) != NONE
    n = round(0.15 * S)
    for x, picked in zip(made, chosen, strict=True):
        words = x.words()
        sizes, hits = np.bincount(words), np.bincount(words, weights=picked)
        assert np.isin(hits, (0.0, *np.unique(sizes))).all() and np.all(
            (hits == 0) | (hits == sizes)
        )
        assert picked.sum() == n  # there are singles in plenty
    assert not chosen[:, [0, -1]].any()
    # A word that overflows is left out: only then are words of one piece preferred.
    single = np.stack([np.bincount(x.words())[x.words()] == 1 for x in made])
    single[:, [0, -1]] = False
    rate_single, rate = chosen[single].mean(), chosen[:, 1:-1].mean()
    assert rate_single == pytest.approx(rate, rel=0.03)


def test_a_word_that_overflows_is_left_out() -> None:
    ids = [CLS, 10, 800, 801, 802, 803, 11, SEP]  # a word of five tokens and one of one; n = 2
    x = example(ids, starts=WORDS.word_starts[ids])
    for seed in range(20):
        group = Masking(what="word", rate=0.25).choose(x, WORDS, np.random.default_rng(seed))
        assert np.flatnonzero(group != NONE).tolist() == [6]


def test_span_lengths() -> None:
    geometric = span_lengths("geometric:.2:10")
    assert np.array_equal(geometric, span_lengths("geometric:0.2"))
    assert geometric[0] == pytest.approx(0.2 / (1 - 0.8**10))
    assert geometric[9] / geometric[8] == pytest.approx(0.8)
    assert geometric @ np.arange(1, 11) == pytest.approx(3.8, abs=0.005)  # what the paper says
    assert span_lengths("inverse:3") == pytest.approx(np.array([6, 3, 2]) / 11)
    assert span_lengths(".6,.4").tolist() == [0.6, 0.4]


def test_spans() -> None:
    """Lengths as drawn, places uniform, n tokens in all, none beside another."""
    made = examples(pieces=False)
    group = choose(Masking(what="span"), made)
    assert ((group != NONE).sum(1) == round(0.15 * S)).all()
    touching = (group[:, 1:] != group[:, :-1]) & (group[:, 1:] != NONE) & (group[:, :-1] != NONE)
    assert not touching.any()
    # The first five always have room: 50 of 77 tokens.
    lengths = np.stack([(group == number).sum(1) for number in range(5)])
    counts = np.bincount(lengths.ravel(), minlength=11)
    assert not counts[0] and within(counts[1:], lengths.size, span_lengths("geometric:.2:10"))
    first = np.argmax(group == 0, 1)
    for length in (1, 2, 5):
        starts = np.bincount(first[lengths[0] == length], minlength=S)
        total, places = starts.sum(), S - 2 - (length - 1)
        assert (
            within(starts[1 : 1 + places], total, 1 / places)
            and starts[1 : 1 + places].sum() == total
        )


def test_spans_are_whole_words() -> None:
    made = examples(pieces=True)[:500]
    group = choose(Masking(what="span"), made)
    sizes = []
    for x, spans in zip(made, group, strict=True):
        words = x.words()
        for number in range(5):
            inside = np.flatnonzero(spans == number)
            assert np.array_equal(inside, np.arange(inside[0], inside[-1] + 1))
            assert words[inside[0]] != words[inside[0] - 1]
            assert words[inside[-1]] != words[inside[-1] + 1]
            sizes.append(words[inside[-1]] - words[inside[0]] + 1)
    first = np.bincount(np.array(sizes).reshape(-1, 5)[:, 0], minlength=11)[1:]
    assert within(first, len(made), span_lengths("geometric:.2:10"))
    assert ((group != NONE).sum(1) <= round(0.15 * S)).all()
    assert ((group != NONE).sum(1)).mean() > 0.995 * round(0.15 * S)


@pytest.mark.parametrize("rate", [0.10, 0.15, 0.25, 0.50])
@pytest.mark.parametrize("mean", [2.0, 3.0, 5.0, 10.0])
def test_random_spans(rate: float, mean: float) -> None:
    """T5's grid: n tokens in round(n / mean) spans, whose lengths are a random composition of n."""
    made = examples(pieces=False)[:: 4 if rate != 0.15 else 1]
    group = choose(Masking(what="random-span", rate=rate, mean_span=mean), made)
    n, spans = round(rate * S), round(round(rate * S) / mean)
    assert ((group != NONE).sum(1) == n).all()
    assert (group.max(1) == spans - 1).all()
    begins = (group[:, 1:] != NONE) & (group[:, :-1] == NONE)
    assert (begins.sum(1) == spans).all()  # no two spans touch
    lengths = np.array([(group == 0).sum(1), (group == spans - 1).sum(1)])  # the first, the last
    for row in lengths:
        counts = np.bincount(row, minlength=n + 1)
        for length in range(1, 6):
            p = comb(n - length - 1, spans - 2) / comb(n - 1, spans - 1)
            assert within(counts[length], len(made), p)
    # Unlike T5's own code the last token is masked as often as the first, and not every time.
    ends = (group[:, [1, -2]] != NONE).sum(0)
    assert within(ends, len(made), spans / (S - 2 - n + 1))


def test_units() -> None:
    """One draw a unit, and a word outside of units; all tokens of it are masked."""
    unit = np.full(S, NONE)
    starts = np.arange(2, S - 12, 10)  # words (2 3 4) (5 6) of each ten tokens are a unit
    for number, first in enumerate(starts):
        unit[first : first + 5] = number
    word_start = np.ones(S, bool)
    word_start[np.concatenate((starts + 1, starts + 2, starts + 4))] = False
    made = [example(ids, starts=word_start, unit=unit) for ids in IDS]
    chosen = choose(Masking(what="unit"), made) != NONE
    inside = unit != NONE
    of_unit = chosen[:, inside].reshape(EXAMPLES, len(starts), 5)
    assert np.array_equal(of_unit.all(2), of_unit.any(2))
    outside = np.flatnonzero(~inside)[1:-1]
    assert within(of_unit[:, :, 0].sum(0), EXAMPLES, 0.15)
    assert within(of_unit[:, :, 0].sum(), EXAMPLES * len(starts), 0.15)
    assert within(chosen[:, outside].sum(0), EXAMPLES, 0.15)
    assert within(chosen[:, outside].sum(), EXAMPLES * len(outside), 0.15)
    assert not chosen[:, [0, -1]].any()


def test_units_if_none_is_drawn() -> None:
    x = example([CLS, 10, 11, SEP])
    rng = np.random.default_rng(0)
    counts = [
        np.sum(Masking(what="unit", rate=0.01).choose(x, WORDS, rng) != NONE) for _ in range(50)
    ]
    assert set(counts) == {1}
    few = Masking(what="unit", rate=0.9, max_predictions=1)
    assert {np.sum(few.choose(x, WORDS, rng) != NONE) for _ in range(50)} == {1}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_frequencies(alpha: float) -> None:
    """The first of the targets is token w with a probability in proportion to count(w)^-alpha, and
    the second the same among those that are left."""
    words = vocabulary(V, counts=True)  # token i occurs i^2 times
    rng = np.random.default_rng(3)
    ids = IDS[:, 1:-1].reshape(-1, 51)  # 20,000 sequences, a million tokens
    weights = (ids**2.0) ** -alpha
    weights /= weights.sum(1, keepdims=True)
    one = Masking(alpha=alpha, max_predictions=1)
    chosen = np.stack([one.choose(example(row), words, rng) for row in ids]) != NONE
    assert (chosen.sum(1) == 1).all()
    for low, high in ((5, 50), (50, 200), (200, 500), (500, 1000)):
        p = np.where((ids >= low) & (ids < high), weights, 0).sum(1)
        count = (chosen & (ids >= low) & (ids < high)).sum()
        assert abs(count - p.sum()) <= 5 * np.sqrt((p * (1 - p)).sum())
    two = Masking(alpha=alpha, max_predictions=2)
    chosen = np.stack([two.choose(example(row), words, rng) for row in ids]) != NONE
    assert (chosen.sum(1) == 2).all()
    # p(i is one of two) = w_i + sum_{j != i} w_j w_i / (1 - w_j)
    ratio = weights / (1 - weights)
    p = weights * (1 + ratio.sum(1, keepdims=True) - ratio)
    rare = ids < 100
    assert abs(chosen[rare].sum() - p[rare].sum()) <= 5 * np.sqrt(p[rare].sum())


def test_unk_in_place_of_mask() -> None:
    masking = Masking(mask_token="unk", replace=(1, 0, 0))
    x = example([CLS, *range(10, 30), SEP])
    group = masking.choose(x, WORDS, np.random.default_rng(0))
    new = masking.corrupt(x.ids, group, WORDS, np.random.default_rng(0))
    assert (new[group != NONE] == UNK).all() and MASK not in new


def test_budget() -> None:
    """n = min(max_predictions, max(1, round(rate S)))"""
    for masking, length, n in (
        (Masking(), 128, 19),
        (Masking(max_predictions=20), 128, 19),
        (Masking(max_predictions=80), 512, 77),
        (Masking(rate=0.4, max_predictions=80), 512, 80),
        (Masking(), 3, 1),
        (Masking(), 0, 1),
    ):
        assert masking.budget(length) == n


SEQUENCES = st.lists(
    st.tuples(st.integers(5, V - 1), st.booleans(), st.booleans()), min_size=0, max_size=40
)


@settings(deadline=None)
@given(
    SEQUENCES,
    st.sampled_from(list(WHAT)),
    st.sampled_from([0.01, 0.15, 0.5, 0.99]),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 10**6),
)
def test_what_always_holds(
    rows: list[tuple[int, bool, bool]], what: str, rate: float, most: int | None, seed: int
) -> None:
    """Special tokens and those that are taken are never masked, others never changed, never more
    than n but for units, and at least one if there is one."""
    ids = np.array([CLS, *(SEP if special else i for i, special, _ in rows), SEP])
    taken = np.array([False, *(t for _, _, t in rows), False])
    x = example(ids, starts=WORDS.word_starts[ids])
    x = x.replace(group=np.where(taken & x.ordinary, 7, NONE))
    masking = Masking(what=what, rate=rate, max_predictions=most)
    rng = np.random.default_rng(seed)
    group = masking.choose(x, WORDS, rng)
    chosen = group != NONE
    assert group.shape == ids.shape and group.dtype == np.int64
    assert not (chosen & ~x.free).any()
    if what != "unit" or most is not None:
        assert chosen.sum() <= masking.budget(len(ids)) or what == "unit" and chosen.sum() <= most
    if x.free.any() and what in ("token", "random-span"):
        assert chosen.sum() == min(masking.budget(len(ids)), x.free.sum())
    new = masking.corrupt(ids, group, WORDS, rng)
    assert np.array_equal(new[~chosen], ids[~chosen])
    assert np.isin(new[chosen], (*WORDS.ordinary, MASK)).all()
    again = np.random.default_rng(seed)
    assert np.array_equal(masking.choose(x, WORDS, again), group)
    assert np.array_equal(masking.corrupt(ids, group, WORDS, again), new)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 30), st.integers(0, 10**6))
def test_place_spans(lengths: list[int], spare: int, seed: int) -> None:
    places = sum(lengths) + max(0, len(lengths) - 1) + spare
    group, starts = place_spans(places, np.array(lengths, np.int64), np.random.default_rng(seed))
    ends = starts + np.array(lengths, np.int64)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert np.array_equal(np.flatnonzero(group == number), np.arange(start, end))
    assert (starts[1:] > ends[:-1]).all() and (group != NONE).sum() == sum(lengths)
    assert not len(starts) or (starts[0] >= 0 and ends[-1] <= places)


def test_random_spans_of_few_places() -> None:
    rng = np.random.default_rng(0)
    assert random_spans(0, 0, 1, rng).tolist() == []
    assert random_spans(3, 3, 3, rng).tolist() == [0, 0, 0]  # no room for gaps: one span
    assert sorted(random_spans(3, 2, 2, rng).tolist()) == [-1, 0, 1]


def test_bad_options() -> None:
    for options, message in (
        ({"what": "letter"}, "what: got 'letter', expected one of token, word, span"),
        ({"rate": 0.0}, "rate: got 0.0, expected 0 < rate < 1"),
        ({"rate": 1.0}, "rate: got 1.0"),
        ({"max_predictions": 0}, "max_predictions: got 0, expected 1 or more"),
        ({"mean_span": 0.5}, "mean_span: got 0.5, expected 1 or more"),
        ({"alpha": -1.0}, "alpha: got -1.0"),
        ({"alpha": 0.5, "what": "word"}, "alpha: got 0.5 with words"),
        ({"replace": (0.8, 0.1)}, r"replace: got \(0.8, 0.1\)"),
        ({"replace": (0.8, 0.1, 0.2)}, "replace: got"),
        ({"replace": (1.2, -0.1, -0.1)}, "replace: got"),
        ({"per": "word"}, "per: got 'word', expected one of token, group"),
        ({"mask_token": "pad"}, "mask_token: got 'pad', expected one of mask, unk"),
        ({"span": "geometric"}, "span: got 'geometric', expected geometric:P, geometric:P:LONG"),
        ({"span": "geometric:.2:10:3"}, "span: got 'geometric:.2:10:3', expected geometric:P"),
        ({"span": "geometric:1:10"}, "span: got"),
        ({"span": "uniform:3"}, "span: got"),
        ({"span": ".5,.4"}, "span: got"),
        ({"span": "inverse:0"}, "span: got"),
    ):
        with pytest.raises(ValueError, match=message):
            Masking(**options)
    with pytest.raises(ValueError, match="alpha: needs the counts of the tokens"):
        Masking(alpha=0.5).choose(example([CLS, 9, SEP]), FLAT, np.random.default_rng(0))
    assert replace(Masking(replace=[0.8, 0.1, 0.1])) == Masking()  # what JSON makes of a tuple
