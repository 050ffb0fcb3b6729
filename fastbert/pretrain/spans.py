"""How long spans are, and where they come to lie: numpy only."""

from __future__ import annotations

from functools import cache

import numpy as np

Array = np.ndarray

# What ``span_lengths`` takes -> the paper, and what it is.
SPANS = {
    "geometric:P:LONGEST": ("SpanBERT, arXiv 1907.10529", "P (1 - P)^(l - 1) up to LONGEST, or 10"),
    "inverse:LONGEST": ("ALBERT, arXiv 1909.11942", "1 / l up to LONGEST"),
    "P1,P2,…": ("UniLMv2, arXiv 2002.12804", "the probabilities of 1, 2, … words themselves"),
}
_LONGEST = 10  # of SpanBERT
_MOST_TRIES = 20  # to place a span at random before its places are counted


@cache
def span_lengths(spec: str) -> Array:
    """(longest,) float64: the probabilities of the lengths 1, 2, …

    geometric:P:LONGEST   P (1 - P)^(l - 1), cut behind LONGEST and normalised (SpanBERT, arXiv
                          1907.10529, section 3.1: P .2, LONGEST 10, a mean of 3.8); geometric:P
                          is geometric:P:10
    inverse:LONGEST       1 / l, normalised (ALBERT, arXiv 1909.11942, eq. 2: LONGEST 3)
    P1,P2,…               the probabilities themselves
    Raises ValueError for anything else.
    """
    kind, *numbers = spec.split(":")
    try:
        if kind == "geometric":
            p, longest = float(numbers[0]), int(numbers[1]) if numbers[1:] else _LONGEST
            weights = p * (1.0 - p) ** np.arange(longest)
            right = len(numbers) <= 2 and 0.0 < p < 1.0
        elif kind == "inverse":
            weights = 1.0 / np.arange(1, int(numbers[0]) + 1)
            right = len(numbers) == 1
        else:
            weights = np.array([float(weight) for weight in kind.split(",")])
            right = not numbers and abs(weights.sum() - 1.0) < 1e-6
    except (ValueError, IndexError):
        right = False
    if not right or not len(weights) or weights.min() < 0.0:
        raise ValueError(
            f"span: got {spec!r}, expected geometric:P, geometric:P:LONGEST, inverse:LONGEST or "
            "probabilities that add up to 1, such as .6,.3,.1"
        )
    return weights / weights.sum()


def random_spans(places: int, hidden: int, spans: int, rng: np.random.Generator) -> Array:
    """(places,) int64: ``hidden`` of them in ``spans`` spans, numbered from 0 on; -1 elsewhere.

    Lengths are a random composition of ``hidden``, as in T5 (arXiv 1910.10683, section 3.3.4, and
    its code), and so are the gaps, at least 1 between two spans. T5 has no gap behind the last
    span, and hides the last token every time; here the outer gaps may be anything, 0 too.
    """
    spans = min(spans, hidden, places - hidden + 1)
    lengths = _composition(hidden, spans, rng)
    return place_spans(places, lengths, rng)[0]


def place_spans(places: int, lengths: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Spans of the given lengths, in their order, with random gaps of 1 or more between them.

    Returns the number of the span at each place, (places,) int64, -1 for none, and the place at
    which each span begins, (spans,).  A length may be 0: such a span begins before that place.
    """
    spans = len(lengths)
    group = np.full(places, -1)
    if not spans:
        return group, np.zeros(0, np.int64)
    # Two more than there are, as the outer gaps may be empty and the inner ones may not.
    gaps = _composition(places - int(lengths.sum()) + 2, spans + 1, rng)
    gaps[0] -= 1
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    hidden = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    group[hidden] = np.repeat(np.arange(spans), lengths)
    return group, starts


def _composition(total: int, parts: int, rng: np.random.Generator) -> Array:
    """(parts,) numbers of at least 1 that add up to ``total``: any of those, equally likely."""
    if parts < 1:
        return np.zeros(0, np.int64)
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


class SpanPlacer:
    """Places spans of whole words one after the other, none on or beside another.

    words: (W,) the length of each word in tokens.  runs: (W,) the number of the run of text that it
    belongs to; special tokens part runs, and no span goes beyond one.
    """

    def __init__(self, words: Array, runs: Array, rng: np.random.Generator) -> None:
        self._tokens = np.concatenate(([0], np.cumsum(words)))
        self._count = len(words)
        self._run_ends = np.searchsorted(runs, runs, side="right")
        self._blocked = bytearray(len(words) + 1)  # a word of a span, or beside one in its run
        self._runs = runs
        self._rng = rng
        self._starts: list[int] = []

    def place(self, length: int, budget: int) -> tuple[int, int] | None:
        """(first word, end) of a span of ``length`` words at a place that is uniform among all that
        there are. Where ``budget`` tokens do not hold them, or no place does, it is a shorter one;
        None where not even one word fits.
        """
        for _ in range(_MOST_TRIES):
            first = self._random_start()
            end = first + length
            if end <= self._run_ends[first] and not any(self._blocked[first:end]):
                if self._tokens[end] - self._tokens[first] > budget:
                    break  # few places fit now, if any
                return self._take(first, end)
        for shorter in range(length, 0, -1):
            starts = self._places(shorter, budget)
            if len(starts):
                first = int(starts[int(self._rng.integers(len(starts)))])
                return self._take(first, first + shorter)
        return None

    def _random_start(self) -> int:
        if not self._starts:
            self._starts = self._rng.integers(self._count, size=64).tolist()
        return self._starts.pop()

    def _places(self, length: int, budget: int) -> Array:
        """Every word at which a span of ``length`` words may begin."""
        first = np.arange(self._count - length + 1)
        taken = np.concatenate(([0], np.cumsum(np.frombuffer(self._blocked, np.uint8)[:-1])))
        fits = first + length <= self._run_ends[first]
        fits &= taken[first + length] == taken[first]
        fits &= self._tokens[first + length] - self._tokens[first] <= budget
        return np.flatnonzero(fits)

    def _take(self, first: int, end: int) -> tuple[int, int]:
        for word in range(max(first - 1, 0), min(end + 1, self._count)):
            if self._runs[word] == self._runs[first]:
                self._blocked[word] = 1
        return first, end
