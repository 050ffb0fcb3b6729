"""Tokens and windows against the tokenizers library's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from fastbert.finetune.features import (
    Features,
    Frame,
    Ragged,
    shorten,
    tokenise,
    tokenise_with_offsets,
    windows,
)

from ._samples import make_small_tokenizer

SMALL = make_small_tokenizer()
TEXTS = [
    "The cat sat.",
    "",
    "  the   cat\tsat\u3000on ",
    "[SEP] a[MASK]cat [CLS]",
    "Café ½ cafe\u0301",
    "\u200b",
    "unable 308-cats",
]


def lists(ragged: Ragged) -> list[list[int]]:
    pairs = zip(ragged.starts, ragged.lengths, strict=True)
    return [ragged.values[start : start + length].tolist() for start, length in pairs]


def plain_tokenizer() -> Tokenizer:
    """One whose words hold blanks: it cannot be taken piece by piece."""
    tokenizer = Tokenizer.from_str(SMALL.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("sat", "isolated")
    return tokenizer


@pytest.mark.parametrize("tokenizer", [SMALL, plain_tokenizer()], ids=["piecewise", "whole"])
def test_tokenise(tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode_batch(TEXTS, add_special_tokens=False)
    assert lists(tokenise(TEXTS, tokenizer)) == [encoding.ids for encoding in expected]
    made, characters = tokenise_with_offsets(TEXTS, tokenizer)
    assert lists(made) == [encoding.ids for encoding in expected]
    offsets = [list(pair) for encoding in expected for pair in encoding.offsets]
    assert characters.tolist() == offsets
    for nothing in (tokenise([], tokenizer), tokenise_with_offsets([], tokenizer)[0]):
        assert lists(nothing) == []


def test_many_words_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lists(tokenise(TEXTS, SMALL))
    monkeypatch.setattr("fastbert.finetune.features._ROWS", 2)
    assert lists(tokenise(TEXTS, SMALL)) == expected


def test_frame() -> None:
    cls, sep = 2, 3
    one, two = (Frame.of(SMALL, pair=pair) for pair in (False, True))
    assert [x.tolist() for x in one[:3]] == [[cls], [], [sep]]
    assert [x.tolist() for x in two[:3]] == [[cls], [sep], [sep]]
    assert one.size == 2
    assert two.types == (0, 0, 0, 1, 1)
    bare = Tokenizer.from_str(SMALL.to_str())
    bare.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match=r"puts no special token before a text, expected \[CLS\]"):
        Frame.of(bare, pair=False)


# --- windows ----------------------------------------------------------------------------------


def words(count: int, word: str = "cat") -> str:
    return " ".join([word, "dog", "mat", "city"][i % 4] for i in range(count))


def theirs(texts: list, max_length: int, stride: int, strategy: str) -> list[tuple]:
    """(row, ids, types) of each window, as the library cuts."""
    tokenizer = Tokenizer.from_str(SMALL.to_str())
    tokenizer.enable_truncation(max_length, stride=stride, strategy=strategy)
    return [
        (row, window.ids, window.type_ids)
        for row, encoding in enumerate(tokenizer.encode_batch(texts))
        for window in (encoding, *encoding.overflowing)
    ]


def ours(first: Ragged, second: Ragged | None, max_length: int, stride: int, sliding: str) -> list:
    frame = Frame.of(SMALL, pair=second is not None)
    made = windows(first, second, frame, max_length, stride, sliding=sliding)
    ends = np.cumsum(made.lengths)
    return [
        (row, made.input_ids[end - n : end].tolist(), made.token_type_ids[end - n : end].tolist())
        for row, end, n in zip(made.row.tolist(), ends, made.lengths, strict=True)
    ]


counts = st.lists(st.integers(0, 20), min_size=1, max_size=5)


@given(counts, st.integers(3, 14), st.integers(0, 11))
@settings(deadline=None, max_examples=60)
def test_windows_are_the_librarys(lengths: list[int], max_length: int, stride: int) -> None:
    stride = min(stride, max_length - 3)
    texts = [words(n) for n in lengths]
    found = ours(tokenise(texts, SMALL), None, max_length, stride, "longer")
    assert found == theirs(texts, max_length, stride, "longest_first")


@given(counts, st.integers(0, 4), st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_windows_over_the_second_are_the_librarys(
    lengths: list[int], question: int, stride: int
) -> None:
    max_length = 13  # 10 beside the special tokens, so that questions of up to 5 are whole
    first, second = [words(question)] * len(lengths), [words(n, "sat") for n in lengths]
    found = ours(tokenise(first, SMALL), tokenise(second, SMALL), max_length, stride, "second")
    pairs = list(zip(first, second, strict=True))
    assert found == theirs(pairs, max_length, stride, "only_second")


@given(counts, st.integers(0, 20), st.integers(5, 14), st.one_of(st.none(), st.integers(0, 5)))
@settings(deadline=None, max_examples=100)
def test_no_token_is_lost_unless_it_is_counted(
    lengths: list[int], other: int, max_length: int, stride: int | None
) -> None:
    frame = Frame.of(SMALL, pair=True)
    room = max_length - frame.size
    stride = None if stride is None else min(stride, room - room // 2 - 1)
    first = Ragged.of([list(range(10, 10 + other))] * len(lengths))
    second = Ragged.of([list(range(30, 30 + n)) for n in lengths])
    made = windows(first, second, frame, max_length, stride)
    assert made.lengths.max() <= max_length
    ends = np.cumsum(made.lengths)
    seen: dict[int, set[int]] = {row: set() for row in range(len(lengths))}
    for row, end, n in zip(made.row.tolist(), ends, made.lengths, strict=True):
        seen[row].update(made.input_ids[end - n : end].tolist())
    for row, count in enumerate(lengths):
        every = {*range(10, 10 + other), *range(30, 30 + count)}
        assert (every <= seen[row]) is not bool(made.truncated[row])
        assert bool(made.truncated[row]) is (other + count > room and min(other, count) > room // 2)


@pytest.mark.parametrize(
    ("max_length", "stride", "message"),
    [
        (2, None, "max_length: got 2, expected more than the 2 special tokens"),
        (5, 3, "stride: got 3, expected 0 .. 2: less than the 3 tokens"),
        (5, -1, "stride: got -1, expected 0 .. 2"),
    ],
)
def test_bad_lengths(max_length: int, stride: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(tokenise(TEXTS, SMALL), None, Frame.of(SMALL, False), max_length, stride)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(2, 12))
def test_shorten(one: int, two: int, room: int) -> None:
    """As taking the last token of the longer text away, the second's of equal ones, does."""
    first, second = Ragged.of([range(one)]), Ragged.of([range(two)])
    a, b, cut = shorten(first, second, room)
    sizes = [one, two]
    while sum(sizes) > room:
        sizes[0 if sizes[0] > sizes[1] else 1] -= 1
    assert sorted([a.lengths[0], b.lengths[0]]) == sorted(sizes)
    assert a.lengths[0] <= one and b.lengths[0] <= two
    assert cut.tolist() == [one + two > room]


# --- Features ---------------------------------------------------------------------------------


def test_features() -> None:
    made = Features(
        np.array([2, 3]),
        np.array([0, 0]),
        {"input_ids": np.arange(5)},
        {"labels": np.array([7, 8])},
        notes={"word": np.arange(5) * 10},
        truncated=1,
    )
    assert len(made) == 2
    assert made[1]["input_ids"].tolist() == [2, 3, 4]
    assert made[1]["labels"] == 8
    assert made.note("word", 0).tolist() == [0, 10]
    assert made.windowed == 1
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=f"feature {wrong} is not among the 2"):
            made[wrong]
