"""What is masked in a sequence, where, and by what: numpy only.

Choosing gives each token the number of its group, -1 for those that stay as they are. A group is
what is masked as one: a token, a word, a span, a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.spans import SpanPlacer, random_spans, span_lengths

Array = np.ndarray

# Masking.what -> the paper, and what it does.
WHAT = {
    "token": ("BERT, arXiv 1810.04805; alpha: XLM, arXiv 1901.07291", "single tokens"),
    "word": ("BERT, arXiv 1810.04805", "whole words"),
    "span": ("SpanBERT, arXiv 1907.10529", "spans of words of random lengths"),
    "random-span": ("T5, arXiv 1910.10683", "spans of tokens of a mean length"),
    "unit": ("ERNIE, arXiv 1904.09223", "phrases, entities and words"),
}
MASK_TOKENS = {
    "mask": ("BERT, arXiv 1810.04805", "[MASK]"),
    "unk": ("Clinchant et al., arXiv 1909.12744", "[UNK], which fine-tuning knows too"),
}


@dataclass(frozen=True)
class Masking:
    """How a sequence of S tokens is masked. The defaults are BERT's.

    Of each sequence n = min(max_predictions, max(1, round(rate S))) tokens are masked, special ones
    never (Devlin et al., arXiv 1810.04805, section 3.1, and Google's code).

    what: ``token``        any n of them.
          ``word``         whole words, in random order, until n; one that would overflow is left
                           out (Google's whole-word models).
          ``span``         spans of whole words until n: the lengths are drawn from ``span``, places
                           are uniform, and no two spans touch (SpanBERT, arXiv 1907.10529, section
                           3.1). The last one is cut to the words that n has room for.
          ``random-span``  n tokens in spans of ``mean_span`` on average (T5, arXiv 1910.10683,
                           section 3.3.4: rates .10, .15, .25, .50, means 2, 3, 5, 10).
          ``unit``         phrases, entities and, outside of them, words: one draw of ``rate`` each,
                           all tokens of which are masked (ERNIE, arXiv 1904.09223, section 3.2). If
                           none is drawn one is masked nonetheless.
    rate: of the tokens.  Later work favours .2 to .4 (Wettig et al., arXiv 2202.08005).
    max_predictions: the most in a sequence (BERT: 20 at 128 tokens, 80 at 512); None for no limit.
    span: see ``span_lengths``.  mean_span: tokens.
    alpha: with ``token``, token w is drawn in proportion to count(w)^-alpha: XLM's .5 (Lample and
        Conneau, arXiv 1901.07291, section 3.3); 0 draws evenly.
    replace: parts of the masked tokens that become the mask token, become a random one of the
        ordinary tokens, and stay. BERT's .8 .1 .1; (1, 0, 0) masks all; ELECTRA's (.85, 0, .15).
    per: whether a ``token`` or a whole ``group`` shares one draw of these (SpanBERT's spans).
    mask_token: ``mask``, or ``unk`` for [UNK], which fine-tuning knows too (Clinchant et al., arXiv
        1909.12744).

    Raises ValueError, naming the field, for what is none of these.
    """

    what: str = "token"
    rate: float = 0.15
    max_predictions: int | None = None
    span: str = "geometric:.2:10"
    mean_span: float = 3.0
    alpha: float = 0.0
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1)
    per: str = "token"
    mask_token: str = "mask"

    def __post_init__(self) -> None:
        object.__setattr__(self, "replace", tuple(float(part) for part in self.replace))
        for name, value, known in (
            ("what", self.what, WHAT),
            ("per", self.per, ("token", "group")),
            ("mask_token", self.mask_token, MASK_TOKENS),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"rate: got {self.rate!r}, expected 0 < rate < 1")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"max_predictions: got {self.max_predictions!r}, expected 1 or more")
        if not self.mean_span >= 1.0:
            raise ValueError(f"mean_span: got {self.mean_span!r}, expected 1 or more")
        if self.alpha < 0.0 or (self.alpha and self.what != "token"):
            raise ValueError(f"alpha: got {self.alpha!r} with {self.what}s, expected 0, or 0 or "
                             "more with tokens")  # fmt: skip
        if len(self.replace) != 3 or min(self.replace) < 0 or abs(sum(self.replace) - 1.0) > 1e-6:
            raise ValueError(
                f"replace: got {self.replace!r}, expected three parts that add up to 1: mask, "
                "random, kept"
            )
        span_lengths(self.span)

    def budget(self, length: int) -> int:
        """n for a sequence of ``length`` tokens, the special ones among them."""
        n = max(1, round(self.rate * length))
        return n if self.max_predictions is None else min(n, self.max_predictions)

    def choose(self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator) -> Array:
        """(S,) int64: the group of each token that is to be masked, NONE for the others. Only
        tokens that are free are chosen, a word or unit only if all of its tokens are."""
        if self.what == "token":
            return self._tokens(example, vocabulary, rng)
        if self.what == "word":
            return self._words(example, rng)
        if self.what == "span":
            return self._spans(example, rng)
        if self.what == "random-span":
            return self._random_spans(example, rng)
        return self._units(example, rng)

    def corrupt(
        self, ids: Array, group: Array, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Array:
        """``ids`` (S,) with the tokens that have a group masked, replaced or kept."""
        places = np.flatnonzero(group != NONE)
        if self.per == "token":
            draw = rng.random(len(places))
        else:
            draw = rng.random(group.max(initial=NONE) + 1)[group[places]]
        masked, replaced, _ = self.replace
        new = ids.copy()
        new[places[draw < masked]] = self.mask_id(vocabulary)
        random = places[(draw >= masked) & (draw < masked + replaced)]
        new[random] = vocabulary.ordinary[rng.integers(len(vocabulary.ordinary), size=len(random))]
        return new

    def mask_id(self, vocabulary: Vocabulary) -> int:
        return vocabulary.special.mask if self.mask_token == "mask" else vocabulary.special.unk

    def _tokens(self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator) -> Array:
        places = np.flatnonzero(example.free)
        if self.alpha:
            # The smallest of exponential variables of rates w are a draw without replacement in
            # proportion to w (Efraimidis and Spirakis 2006).
            waits = rng.exponential(size=len(places))
            places = places[np.argsort(waits / self._weights(example.ids[places], vocabulary))]
        else:
            places = rng.permutation(places)
        chosen = places[: self.budget(len(example))]
        group = np.full(len(example), NONE)
        group[chosen] = np.arange(len(chosen))
        return group

    def _weights(self, ids: Array, vocabulary: Vocabulary) -> Array:
        """count^-alpha of each."""
        if vocabulary.counts is None:
            raise ValueError("alpha: needs the counts of the tokens, which the vocabulary lacks")
        return np.maximum(vocabulary.counts[ids], 1.0) ** -self.alpha

    def _words(self, example: Example, rng: np.random.Generator) -> Array:
        words = example.words()
        sizes = _free_sizes(words, example)
        left = self.budget(len(example))
        chosen = np.full(len(sizes), NONE)
        for number in rng.permutation(np.flatnonzero(sizes)).tolist():
            size = int(sizes[number])
            if size <= left:
                chosen[number] = number
                left -= size
                if not left:
                    break
        return chosen[words]

    def _spans(self, example: Example, rng: np.random.Generator) -> Array:
        words = example.words()
        sizes = _free_sizes(words, example)
        free = np.flatnonzero(sizes)
        group = np.full(len(example), NONE)
        left = self.budget(len(example))
        if not len(free):
            return group
        first_token = np.searchsorted(words, free)
        # Between two words of one run no other word stands.
        runs = np.cumsum(np.diff(free, prepend=free[0]) != 1)
        placer = SpanPlacer(sizes[free], runs, rng)
        probabilities = span_lengths(self.span)
        lengths = 1 + rng.choice(len(probabilities), size=left, p=probabilities)
        for number, length in enumerate(lengths.tolist()):
            span = placer.place(length, left)
            if span is None:
                break
            first = first_token[span[0]]
            end = first_token[span[1] - 1] + sizes[free[span[1] - 1]]
            group[first:end] = number
            left -= int(end - first)
            if not left:
                break
        return group

    def _random_spans(self, example: Example, rng: np.random.Generator) -> Array:
        places = np.flatnonzero(example.free)
        n = min(self.budget(len(example)), len(places))
        spans = max(1, round(n / self.mean_span))
        group = np.full(len(example), NONE)
        group[places] = random_spans(len(places), n, spans, rng)
        return group

    def _units(self, example: Example, rng: np.random.Generator) -> Array:
        owner = example.words()
        if example.unit is not None:
            inside = np.flatnonzero(example.unit != NONE)
            _, first, number = np.unique(
                example.unit[inside], return_index=True, return_inverse=True
            )
            owner[inside] = owner[inside[first]][number]  # a unit is called by its first word
        sizes = _free_sizes(owner, example)
        there = np.flatnonzero(sizes)
        drawn = there[rng.random(len(there)) < self.rate]
        if not len(drawn) and len(there):
            drawn = rng.choice(there, 1)
        drawn = rng.permutation(drawn)
        if self.max_predictions is not None:
            drawn = drawn[np.cumsum(sizes[drawn]) <= self.max_predictions]
        group = np.full(len(sizes), NONE)
        group[drawn] = drawn
        return group[owner]


def _free_sizes(number: Array, example: Example) -> Array:
    """How many tokens have each number; 0 for a number of which not all tokens are free."""
    sizes = np.bincount(number)
    free = np.bincount(number, weights=example.free).astype(np.int64)
    return np.where(free == sizes, sizes, 0)
