"""Where sentences end, and WikiText's spacing undone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data.sentences import (
    RawDocument,
    detokenise_wikitext,
    sentences_of,
    split_sentences,
)


@pytest.mark.parametrize(
    "text",  # "|" marks the ends of sentences
    [
        "One. |Two! |Three? |Four... |Five…",
        'He said "Go." |She left. |"Why?" |(Nobody knew.) |1990 came.',
        "J. K. Rowling met Dr. Smith and Prof. Lee in the U.S. Army.",
        "See Fig. 3 and No. 5, e.g. the one of Jan. 7. |Then stop.",
        "So do I. |Then go.",
        "It cost 3.50 in all, i.e. a lot. |Python3.11 is out.",
        "Wait! he cried. what? |Go.",
        "他来了。|她走了！|谁？",
        "『はい。』|そうです。",
        "  Blank   .  |  ",
        "Yahoo! was big. |It is not.",
        "ends without a mark",
        "",
    ],
)
def test_sentences_end(text: str) -> None:
    expected = [part.strip() for part in text.split("|") if part.strip()]
    assert split_sentences(text.replace("|", "")) == expected


@given(st.text(st.sampled_from("aB.!?…。 \t\"'()1")))
def test_no_character_is_lost(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("a role @-@ playing game , with 1 @,@ 000 fans", "a role-playing game, with 1,000 fans"),
        ("( 0 @.@ 91 m ) [ sic ] ; it 's $ 5 .", "(0.91 m) [sic]; it's $5."),
        ('the " Nameless " , a unit', 'the "Nameless", a unit'),
        ('he said " Go . " She went .', 'he said "Go." She went.'),
        ("at .com and 5 : 30 ; 50 % !", "at .com and 5: 30; 50%!"),
        ("no ' change ' here", "no ' change ' here"),
    ],
)
def test_wikitext_is_detokenised(spaced: str, plain: str) -> None:
    assert detokenise_wikitext(f" {spaced} ") == plain


def test_modes() -> None:
    lines = ["One. Two.", " Three "]
    assert sentences_of(RawDocument(lines)) == ["One.", "Two.", "Three"]
    assert sentences_of(RawDocument(lines), "lines") == ["One. Two.", "Three"]
    wikitext = RawDocument(["One @-@ two . Three ."], wikitext=True)
    assert sentences_of(wikitext) == ["One-two.", "Three."]
    assert sentences_of(wikitext, "lines") == ["One-two. Three."]
