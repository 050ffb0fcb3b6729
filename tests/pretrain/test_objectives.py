"""What each objective does to an example and asks of it, against cases written out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastbert.data import Corpus
from fastbert.pretrain import (
    OBJECTIVES,
    Example,
    Masking,
    Objective,
    PretrainingData,
    open_source,
    parse,
)
from fastbert.pretrain.encode import ALONE, UNSEEN
from fastbert.pretrain.examples import NONE

from ._samples import CLS, MASK, SEP, asked, example, prepare

ALL_MASKED = Masking(rate=0.9, replace=(1.0, 0.0, 0.0))


def only(x: Example, *places: int) -> Example:
    """With all but these places taken, so that any draw has one outcome."""
    group = np.full(len(x), 100)
    group[list(places)] = NONE
    return x.replace(group=group)


def test_mlm() -> None:
    x = only(example([CLS, 10, 11, 12, SEP, 13, SEP]), 2, 5)
    found = prepare("mlm", x, masking=ALL_MASKED)
    assert found.ids.tolist() == [CLS, 10, MASK, 12, SEP, MASK, SEP]
    assert asked(found, "mlm") == {"index": [2, 5], "labels": [11, 13]}
    assert x.ids.tolist() == [CLS, 10, 11, 12, SEP, 13, SEP]  # not changed in place


def test_span_boundary() -> None:
    """Targets at s-1, e+1 and i-s for every i of a stretch of masked tokens."""
    x = only(example([CLS, 10, 11, 12, 13, 14, 15, SEP]), 2, 3, 4, 6)
    found = prepare("mlm+sbo", x, masking=ALL_MASKED)
    assert found.ids.tolist() == [CLS, 10, MASK, MASK, MASK, 14, MASK, SEP]
    assert asked(found, "sbo") == {
        "left_index": [1, 1, 1, 5],
        "right_index": [5, 5, 5, 7],
        "offset": [0, 1, 2, 0],
        "labels": [11, 12, 13, 15],
    }
    short = prepare("mlm+sbo", x, masking=ALL_MASKED, sbo={"longest": 2})
    assert asked(short, "sbo")["offset"] == [0, 1, 0]
    assert asked(short, "sbo")["labels"] == [11, 12, 15]
    at_ends = prepare("mlm+sbo", only(example([CLS, 10, 11, SEP]), 1, 2), masking=ALL_MASKED)
    assert asked(at_ends, "sbo")["left_index"] == [0, 0]
    assert asked(at_ends, "sbo")["right_index"] == [3, 3]


def test_word_order() -> None:
    """Three tokens in one of their five other orders, and what stood there."""
    x = only(example([CLS, 10, 11, 12, 13, 14, SEP]), 1, 3, 4, 5)  # 1 has no neighbours
    orders = Counter()
    for seed in range(500):
        found = prepare("word-order", x, seed)
        assert found.ids[[0, 1, 2, 6]].tolist() == [CLS, 10, 11, SEP]
        orders[tuple(found.ids[3:6].tolist())] += 1
        assert asked(found, "word-order") == {"index": [3, 4, 5], "labels": [12, 13, 14]}
        assert len(set(found.group[3:6])) == 1 and found.group[3] != NONE
    assert len(orders) == 5 and (12, 13, 14) not in orders
    assert max(abs(n - 100) for n in orders.values()) < 4 * np.sqrt(80)


def test_word_order_shuffles_5_percent_of_trigrams() -> None:
    rng = np.random.default_rng(0)
    x = example([CLS, *rng.permutation(np.arange(510) % 25 + 5), SEP])
    counts = np.zeros(512)
    for seed in range(300):
        found = prepare("word-order", x, seed)
        index = found.targets["word-order"]["index"].reshape(-1, 3)
        assert len(index) == round(0.05 * 508)
        assert (np.diff(index) == 1).all() and len(np.unique(index)) == index.size
        assert np.array_equal(np.sort(found.ids[index]), np.sort(x.ids[index]))
        counts[index.ravel()] += 1
    p = counts.sum() / 300 / 510
    assert abs(counts[10:500] - 300 * p).max() < 5 * np.sqrt(300 * p)
    alone = prepare("mlm+word-order", x)
    masked, shuffled = alone.targets["mlm"]["index"], alone.targets["word-order"]["index"]
    assert not set(masked.tolist()) & set(shuffled.tolist()) and len(shuffled) == 3 * 25


def test_token_facts() -> None:
    x = example(
        [CLS, 10, 11, 10, SEP],
        capitalised=np.array([0, 1, 0, 0, 0], bool),
        elsewhere=np.array([0, 1, 0, 1, 0], bool),
    )
    found = prepare("capitalised+elsewhere", x)
    assert asked(found, "capitalised") == {"index": [1, 2, 3], "labels": [True, False, False]}
    assert asked(found, "elsewhere") == {"index": [1, 2, 3], "labels": [True, False, True]}


@pytest.mark.parametrize("name", ["nsp", "sop", "3way", "distance"])
def test_relations(name: str) -> None:
    x = example([CLS, 10, SEP, 11, SEP])
    for relation in range(len(OBJECTIVES[name].relations)):
        found = prepare(name, x.replace(relation=relation))
        assert asked(found, name) == {"index": [0], "labels": [relation]}
    assert asked(prepare(name, x), name) == {"index": [], "labels": []}  # one segment: no question


def test_relations_are_those_of_the_papers() -> None:
    relations = {o.name: o.relations for o in OBJECTIVES.values() if o.relations}
    assert relations == {
        "nsp": ("next", "other"),  # 0: is next, as in Google's code
        "sop": ("next", "previous"),  # 0: in order
        "3way": ("next", "previous", "other"),
        "distance": ("next", "same", "other"),  # ERNIE 2.0's 0, 1, 2
    }


def test_sop_swaps_half(documentation: Corpus) -> None:
    """The same two segments in a row, in their order or swapped."""
    objectives = parse("sop")
    source = open_source("pairs", documentation, 128, objectives, duplicates=20, short=0.0)
    data = PretrainingData(source, objectives, seed=0)
    swapped = total = 0
    for i in np.random.default_rng(0).permutation(len(data))[:4000]:
        x = data[int(i)]
        if len(x.targets["sop"]["labels"]):
            total += 1
            swapped += int(x.targets["sop"]["labels"][0])
    assert total > 2000 and abs(swapped - total / 2) < 4 * np.sqrt(total) / 2


# The classes of Reordering for three sentences of one token each, as what stands there.
_CLASSES = {
    (10, 11, 12): {0, 1, 3},  # one part, or several in their order
    (11, 12, 10): {2, 6},  # 10 | 11 12 swapped; three parts
    (12, 10, 11): {2, 7},  # 10 11 | 12 swapped
    (10, 12, 11): {4},
    (11, 10, 12): {5},
    (12, 11, 10): {8},
}


def test_reordering() -> None:
    x = example([CLS, 10, 11, 12, SEP], sentence=[0, 0, 1, 2, 0])
    seen = Counter()
    for seed in range(3000):
        found = prepare("reorder", x, seed)
        (label,) = asked(found, "reorder")["labels"]
        assert asked(found, "reorder")["index"] == [0]
        assert found.ids[[0, 4]].tolist() == [CLS, SEP]
        assert label in _CLASSES[tuple(found.ids[1:4].tolist())]
        assert found.sentence.tolist() == [-1, *(found.ids[1:4] - 10), -1]
        seen[label] += 1
    p = np.array([1 / 3, *[1 / 6] * 2, *[1 / 18] * 6])
    counts = np.array([seen[label] for label in range(9)])
    assert (abs(counts - 3000 * p) < 4.5 * np.sqrt(3000 * p * (1 - p))).all()


def test_reordering_moves_whole_parts_of_the_first_segment() -> None:
    x = example([CLS, 10, 11, 12, 13, SEP, 20, 21, SEP], sentence=[0, 0, 0, 1, 1, 0, 2, 3, 0])
    x.token_type_ids[6:] = 1
    for seed in range(50):
        found = prepare("reorder", x, seed)
        assert found.ids[5:].tolist() == [SEP, 20, 21, SEP]
        assert found.ids[1:5].tolist() in ([10, 11, 12, 13], [12, 13, 10, 11])
    lone = prepare("reorder", example([CLS, 10, 11, SEP]))
    assert asked(lone, "reorder")["labels"] == [0] and lone.ids.tolist() == [CLS, 10, 11, SEP]
    assert asked(prepare("reorder", example([CLS, SEP])), "reorder")["labels"] == [0]


def test_replaced_tokens() -> None:
    x = only(example([CLS, 10, 11, 12, SEP]), 1, 3)
    found = prepare("rtd", x, masking=ALL_MASKED)
    assert found.ids.tolist() == [CLS, MASK, 11, MASK, SEP]
    assert asked(found, "rtd") == {"place": [1, 3], "labels": [10, 12], "index": [0, 1, 2, 3, 4]}
    (objective,) = parse("rtd")
    assert objective.masking.replace == (0.85, 0.0, 0.15)  # type: ignore[attr-defined]
    assert (objective.divisor, objective.weight) == (None, 50.0)  # type: ignore[attr-defined]


def test_permutation_lm() -> None:
    """The last sixth of a random order is predicted by rows that are appended."""
    x = example([CLS, *range(10, 22), SEP])
    counts = np.zeros(14)
    for seed in range(600):
        found = prepare("plm", x, seed)
        (first, second) = asked(found, "plm")["labels"]  # 12 / 6
        assert asked(found, "plm")["index"] == [14, 15]
        assert found.ids.tolist() == [*x.ids.tolist(), MASK, MASK]
        assert found.position_ids is not None and found.visibility is not None
        places = found.position_ids[14:]
        assert x.ids[places].tolist() == [first, second] and places[0] < places[1]
        assert found.position_ids[:14].tolist() == list(range(14))
        ranks = found.visibility[places, 0]
        assert sorted(ranks) == [1, 2] and found.visibility[:14, 0].sum() == 3
        assert np.array_equal(found.visibility[:14, 0], found.visibility[:14, 1])
        assert found.visibility[14:].tolist() == [[UNSEEN, rank - 1, ALONE] for rank in ranks]
        assert set(found.visibility[:14, 2]) == {ALONE}
        assert found.sentence[14:].tolist() == [NONE, NONE]
        counts[places] += 1
    assert counts[0] == counts[13] == 0
    assert abs(counts[1:13] - 100).max() < 4.5 * np.sqrt(100 * 5 / 6)
    for tokens, predicted in ((30, 5), (510, 85), (2, 1)):
        found = prepare("plm", example([CLS, *[7] * tokens, SEP]))
        assert len(found.targets["plm"]["labels"]) == predicted


def test_pseudo_masks() -> None:
    """x2 and the word x4 x5 are masked, one before the other in either order."""
    x = only(example([CLS, 10, 11, 12, 13, 14, SEP], starts=[1, 1, 1, 1, 1, 0, 1]), 2, 4, 5)
    masking = Masking(what="word", rate=0.9, replace=(1, 0, 0))
    steps = set()
    for seed in range(40):
        found = prepare("unilm2", x, seed, masking=masking)
        assert found.ids.tolist() == [CLS, 10, MASK, 12, MASK, MASK, SEP, 11, 13, 14] + [MASK] * 3
        assert found.position_ids is not None and found.visibility is not None
        assert found.position_ids.tolist() == [*range(7), 2, 4, 5, 2, 4, 5]
        assert asked(found, "unilm2") == {
            "index": [2, 4, 5], "pseudo_index": [10, 11, 12], "labels": [11, 13, 14]
        }  # fmt: skip
        step = found.visibility[7:10, 0].tolist()
        steps.add(tuple(step))
        assert found.visibility.tolist() == [
            *[[0, 0, ALONE]] * 7,
            *([i, i, ALONE] for i in step),
            *([UNSEEN, i - 1, i] for i in step),
        ]
    assert steps == {(1, 2, 2), (2, 1, 1)}


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_examples_without_text(name: str) -> None:
    """A sequence of special tokens alone asks nothing, and breaks nothing."""
    x = example([CLS, SEP], capitalised=np.zeros(2, bool), elsewhere=np.zeros(2, bool))
    x = prepare("mlm+" + name if name == "sbo" else name, x)
    for targets in x.targets.values():
        assert not any(
            len(array) for key, array in targets.items() if key in ("labels", "tokens")
        ) or (name == "reorder")


def test_parse() -> None:
    names = [objective.name for objective in parse("nsp+reorder+mlm")]
    assert names == ["reorder", "mlm", "nsp"]  # arranged, corrupted, asked
    (mlm,) = parse("mlm", Masking(rate=0.4))
    assert mlm.masking == Masking(rate=0.4)  # type: ignore[attr-defined]
    (rtd,) = parse("rtd", options={"rtd": {"divisor": 3, "weight": 25.0}})
    assert (rtd.divisor, rtd.weight) == (3, 25.0)  # type: ignore[attr-defined]
    for text, options, message in (
        ("mlm+xyz", {}, "objective: got 'xyz', expected some of mlm, sbo"),
        ("", {}, "objective: got ''"),
        ("mlm+mlm", {}, r"objective: mlm\+mlm has one twice"),
        ("mlm+rtd", {}, "objective: mlm and rtd both corrupt the text"),
        ("mlm+nsp+sop", {}, "objective: nsp and sop both ask for pairs"),
        ("sbo", {}, "objective: sbo goes with mlm, got sbo"),
        ("bart+nsp", {}, "objective: bart goes with no other, got"),
        ("mlm", {"rtd": {"size": 3}}, None),
        ("rtd", {"rtd": {"size": 3}}, "objective rtd: got size, expected some of divisor"),
        ("rtd", {"rtd": {"divisor": 0}}, "divisor: got 0, expected 1 or more"),
        ("plm", {"plm": {"k": 0}}, "k: got 0, expected 1 or more"),
        ("word-order", {"word-order": {"rate": 0.5}}, "rate: got 0.5, expected 0 < rate <= 1/3"),
        ("reorder", {"reorder": {"most": 6}}, r"most: got 6, expected 2 \.\. 5"),
        ("mlm", {"abc": {}}, "objective: got 'abc'"),
    ):
        if message is None:
            parse(text, None, options)  # options of an objective that is not there are not read
            continue
        with pytest.raises(ValueError, match=message):
            parse(text, None, options)


def test_every_objective_says_what_it_is() -> None:
    for name, kind in OBJECTIVES.items():
        assert issubclass(kind, Objective) and kind.name == name
        assert "arXiv" in kind.paper and kind.summary and kind.__doc__
