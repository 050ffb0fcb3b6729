"""Raw documents to sentences: a small rule for English-like text, and WikiText's spacing undone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

MODES = ("auto", "lines")


class RawDocument(NamedTuple):
    """A document as its source holds it.

    lines: its paragraphs, or its sentences where the source has one a line; none is blank.
    wikitext: whether they are spaced as WikiText spaces them: ``role @-@ playing game , a``.
    """

    lines: list[str]
    wikitext: bool = False


def sentences_of(document: RawDocument, mode: str = "auto") -> list[str]:
    """The sentences of a document, in order, none of them blank.

    mode: ``auto`` splits every line by ``split_sentences``; ``lines`` takes each as it is.
    """
    lines: Iterable[str] = document.lines
    if document.wikitext:
        lines = map(detokenise_wikitext, lines)
    if mode == "lines":
        return [line for line in map(str.strip, lines) if line]
    return [sentence for line in lines for sentence in split_sentences(line)]


# --- where sentences end ----------------------------------------------------------------------

# Groups: the marks; white space behind them and any closing quotes and brackets; what comes next
# after any opening ones. One set of characters to look for first: an alternation is 5 times slower.
_END = re.compile(r"""([.!?…。！？]+)["'”’»)\]」』）]*(\s*)(?=["'“‘«(\[「『（]*(\S))""")
_NO_SPACE_NEEDED = "。！？"
# A word of letters between dots: an initial (J.), an abbreviation (U.S., e.g.). "I" is a pronoun.
_INITIALS = re.compile(r"(?!I$)(?:[^\W\d_]\.)*[^\W\d_]")
# What is written before a name or a number, and so hardly ever ends a sentence.
_BEFORE_NAMES = """
    Mr Mrs Ms Dr Prof St Mt Ft Gen Col Maj Capt Lt Sgt Rev Hon Gov Sen Rep Pres Messrs Mme Mlle
    No Nos Vol Vols Fig Figs Eq Sec Ch pp vs cf ca viz approx al
    Jan Feb Mar Apr Jun Jul Aug Sept Sep Oct Nov Dec
"""
_ABBREVIATIONS = frozenset(_BEFORE_NAMES.split())


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph, stripped of white space at both ends.

    A sentence ends at ``. ! ? …``, closing quotes or brackets included, before white space, unless
    - the next word begins with a lower-case letter, after any opening quotes or brackets; or
    - the mark is one full stop behind an initial or letters between dots (J., U.S., e.g.) or behind
      an abbreviation that stands before names or numbers (Dr., No., Fig., …).
    It also ends at ``。！？``, which no white space has to follow.
    The rule errs to the side of sentences that are too long: ``in the U.S. The`` is not split.
    """
    found = []
    start = 0
    for match in _END.finditer(paragraph):
        marks, space, following = match.groups()
        if marks[-1] not in _NO_SPACE_NEEDED:
            if not space or following.islower():
                continue
            if marks == ".":
                before = paragraph[start : match.start()]
                word = before[before.rfind(" ") + 1 :].lstrip("\"'“‘«([")
                if word in _ABBREVIATIONS or _INITIALS.fullmatch(word):
                    continue
        found.append(paragraph[start : match.end()].strip())
        start = match.end()
    found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


# --- WikiText ---------------------------------------------------------------------------------

_QUOTED = re.compile(r'" ([^"]*[^" ]) "')
_BEFORE = re.compile(r" (?=[.,;:!?%)\]](?:[\s\"'.,;:!?)\]]|$)|'(?:s|t|d|m|re|ve|ll)\b)")
_PLAIN = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("( ", "("), ("[ ", "["), ("$ ", "$"))


def detokenise_wikitext(line: str) -> str:
    """A line as it was before WikiText put white space around its punctuation.

    ``role @-@ playing game ( 1 @,@ 000 " fans " ) , it 's`` becomes
    ``role-playing game (1,000 "fans"), it's``. For a BERT tokenizer, which cuts at punctuation
    anyway, the ``@`` alone matter; sentences are found, and read, by the rest.
    """
    for spaced, plain in _PLAIN:
        line = line.replace(spaced, plain)
    return _BEFORE.sub("", _QUOTED.sub(r'"\1"', line)).strip()
