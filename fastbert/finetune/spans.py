"""Answers in a context: from characters to tokens and back, and SQuAD's scores."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# --- scores -----------------------------------------------------------------------------------


def normalise(answer: str) -> str:
    """In lower case, without punctuation and articles, blanks made one (SQuAD's evaluation,
    Rajpurkar et al., arXiv 1606.05250, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, normalised; no answers stand for the empty one."""
    return float(normalise(predicted) in map(normalise, answers or ("",)))


def f1(predicted: str, answers: Sequence[str]) -> float:
    """The best F1 of the words of the prediction against those of an answer, normalised."""
    return max(_f1(normalise(predicted).split(), normalise(a).split()) for a in answers or ("",))


def _f1(predicted: Sequence[str], answer: Sequence[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    common = (Counter(predicted) & Counter(answer)).total()
    return 2 * common / (len(predicted) + len(answer))


# --- characters and tokens --------------------------------------------------------------------


def token_span(starts: Array, ends: Array, start: int, end: int) -> tuple[int, int] | None:
    """(first, last) of the tokens that hold any of the characters start .. end - 1.

    starts, ends: (n,) int, the characters of each token, ascending.  None where no token does.
    """
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(starts, end, side="left")) - 1
    return (first, last) if first <= last else None


class Span(NamedTuple):
    """Tokens first .. last, and the sum of their logits."""

    first: int
    last: int
    score: float


def best_span(start: Array, end: Array, most: int) -> Span:
    """The span of at most ``most`` tokens with the highest start plus end logit (Devlin et al.,
    arXiv 1810.04805, section 4.2); the first of equal ones.

    start, end: (n,), n >= 1.
    """
    most = min(most, len(end))
    behind = np.concatenate((end, np.full(most - 1, -np.inf, end.dtype)))
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(behind, most)
    first, length = divmod(int(sums.argmax()), most)
    return Span(first, first + length, float(sums[first, length]))
