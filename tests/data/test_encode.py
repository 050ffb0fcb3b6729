"""Encoder: what it remembers changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from fastbert.data import encode as encoding
from fastbert.data.encode import Encoded, Encoder
from fastbert.data.tokenizer import token_dtype, works_piecewise

from ._oracle import bert_tokenizer, encode_documents

UNCASED, CASED = bert_tokenizer(), bert_tokenizer(lowercase=False)
# Any character, and those that BERT's normaliser, Python and Unicode see differently.
TEXT = st.text(st.one_of(st.sampled_from("abcdeABCDEéÉ ̈İßſſ猫.#[]' \t\x1c\x85\u00a0\u200b\u2028"),
                         st.characters(exclude_categories=["Cs"])), max_size=30)  # fmt: skip
WORDS = st.lists(st.sampled_from(["The", "cat", "cats", "[SEP]", "[MASK]", "##s", "unable", "ZZ",
                                  "É", "New", "York.", "(the", "", "dogs,"]))  # fmt: skip
SENTENCES = st.one_of(TEXT, WORDS.map(" ".join))
DOCUMENTS = st.lists(st.lists(SENTENCES, max_size=4), max_size=4)


def check(encoded: Encoded, documents: list[list[str]], tokenizer: Tokenizer) -> None:
    expected = encode_documents(documents, tokenizer)
    flat = [token for document in expected for sentence in document for token in sentence]
    assert encoded.tokens.tolist() == [token.id for token in flat]
    assert encoded.capitalised.tolist() == [token.capitalised for token in flat]
    sentences = [sentence for document in expected for sentence in document]
    assert encoded.sentence_lengths.tolist() == [len(sentence) for sentence in sentences]
    assert encoded.document_lengths.tolist() == [len(document) for document in expected]


@pytest.mark.parametrize("tokenizer", [UNCASED, CASED], ids=["uncased", "cased"])
@settings(max_examples=150, deadline=None)
@given(calls=st.lists(DOCUMENTS, min_size=1, max_size=3))
def test_encodes_as_the_tokenizer_does(tokenizer: Tokenizer, calls: list[list[list[str]]]) -> None:
    encoder = Encoder(tokenizer)
    for documents in calls:  # the later ones find what the earlier ones left
        check(encoder.encode(documents), documents, tokenizer)


def test_a_full_table_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_MOST_PIECES", 4)
    encoder = Encoder(UNCASED)
    for text in ("the cat sat", "on the mat", "the cat sat on the mat in a city", "a b c d e"):
        check(encoder.encode([[text]]), [[text]], UNCASED)
        assert len(encoder._slots) <= max(4, len(set(text.split(" "))))


def test_special_tokens_in_a_text_are_plain_text() -> None:
    tokens = Encoder(UNCASED).encode([["the [SEP] cat"]]).tokens.tolist()
    assert tokens == [UNCASED.token_to_id(t) for t in ("the", "[", "sep", "]", "cat")]


def test_capital_letters_by_hand() -> None:
    """Of the word, not of the piece; in the raw text, though the tokenizer lower-cases."""
    encoded = Encoder(UNCASED).encode([['The cats UNABLE "I" Édé 9']])
    pieces = [UNCASED.id_to_token(i) for i in encoded.tokens.tolist()]
    assert list(zip(pieces, encoded.capitalised.tolist(), strict=True)) == [
        ("the", True), ("cat", False), ("##s", False), ("un", True), ("##able", True),
        ('"', False), ("[UNK]", True), ('"', False), ("e", True), ("##d", True), ("##e", True),
        ("9", False),
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["added token", "pre-tokenizer"])
def test_where_blanks_do_not_separate_sentences_are_encoded_whole(change: str) -> None:
    tokenizer = bert_tokenizer()
    assert works_piecewise(tokenizer)
    if change == "added token":
        tokenizer.add_tokens([AddedToken("new york", normalized=True)])
    else:
        splits = [pre_tokenizers.Split("t m", "isolated"), pre_tokenizers.BertPreTokenizer()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    assert not works_piecewise(tokenizer)
    documents = [["the new york cat", "New York mat"], ["the cat sat mat"]]
    check(Encoder(tokenizer).encode(documents), documents, tokenizer)


def test_nothing_to_encode() -> None:
    encoded = Encoder(UNCASED).encode([[], ["", " "]])
    assert [len(x) for x in encoded] == [0] * 6
    assert encoded.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("size", "dtype"), [(100, np.uint16), (65535, np.uint16), (65536, np.uint32)]
)
def test_token_dtype(size: int, dtype: type) -> None:
    assert token_dtype(size) is dtype
