"""Phrases among the tokens: longest match, whole words, one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.units import Units, read_phrases

from ._oracle import bert_tokenizer, find_units

TOKENIZER = bert_tokenizer()
WORDS = ("new", "york", "city", "cat", "cats", "un", "unable", "a", "qq")
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def found(phrases: list[str], sentences: list[str]) -> list[tuple[int, int]]:
    encoded = [ids(sentence) for sentence in sentences]
    tokens = np.array(sum(encoded, []), np.uint16)
    ends = np.cumsum([len(sentence) for sentence in encoded], dtype=np.int64)
    starts, stops = Units(phrases, TOKENIZER).find(tokens, ends)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


@pytest.mark.parametrize(
    ("phrases", "sentences", "expected"),
    [
        (["New York", "new york city"], ["a New York cat", "new york city"], [(1, 3), (4, 7)]),
        (["new york city"], ["in new york", "city"], []),  # no unit goes beyond a sentence
        (["un", "cat"], ["unable cats un"], [(4, 5)]),  # nor ends inside a word: un ##able cat ##s
        (["cats"], ["cats cat"], [(0, 2)]),
        (["a b", "b c d"], ["a b c d"], [(0, 2)]),  # from left to right
        (["qq"], ["qq the"], []),  # unknown to the tokenizer: it could be any word
        (["a b c", "b"], ["a b d"], [(1, 2)]),
    ],
)
def test_by_hand(phrases: list[str], sentences: list[str], expected: list[tuple[int, int]]) -> None:
    assert found(phrases, sentences) == expected


@settings(deadline=None)
@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=4))
def test_as_by_brute_force(phrases: list[str], sentences: list[str]) -> None:
    unknown = TOKENIZER.token_to_id("[UNK]")
    known = [ids(phrase) for phrase in phrases if unknown not in ids(phrase)]
    expected, first = [], 0
    for sentence in map(ids, sentences):
        spans = find_units(sentence, known, TOKENIZER)
        expected += [(first + start, first + end) for start, end in spans]
        first += len(sentence)
    assert found(phrases, [sentence for sentence in sentences if sentence]) == expected


def test_equal_phrases_count_once() -> None:
    assert Units(["New York", "new york", "cat", "qq", ""], TOKENIZER).count == 2


def test_read_phrases(tmp_path: Path) -> None:
    lines, table = tmp_path / "units.jsonl", tmp_path / "units.tsv"
    lines.write_text('"New York"\n\n{"text": "a cat", "kind": "np"}\n', encoding="utf-8")
    table.write_text("New York\tLOC\t12\na cat\n", encoding="utf-8")
    assert read_phrases(lines) == read_phrases(table) == ["New York", "a cat"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("u.jsonl", b'"a"\n{"txt": "b"}\n', r"u\.jsonl: line 2: expected a text"),
        ("u.jsonl", b'"a', r"u\.jsonl: line 1 is not JSON"),
        ("u.tsv", b"a\n\tLOC\n", r"u\.tsv: line 2: holds no phrase"),
        ("u.tsv", b"a\n\xff\n", r"u\.tsv: line 2 is not UTF-8"),
        ("u.tsv", b"\n", "holds no phrase"),
        ("u.csv", b"a\n", r"expected a \.jsonl, \.tsv or \.txt"),
    ],
)
def test_bad_lists_of_phrases(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_phrases(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_phrases(tmp_path / "missing.tsv")
