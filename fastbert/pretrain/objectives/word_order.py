"""StructBERT's word structural objective."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from fastbert.config import BertConfig
from fastbert.nn import LMPredictions
from fastbert.pretrain.examples import Example, Vocabulary
from fastbert.pretrain.objectives.masked import predict_tokens
from fastbert.pretrain.objectives.objective import Encoded, Objective, Targets, Term

_SIZE = 3
_SHUFFLES = np.array(list(permutations(range(_SIZE)))[1:])  # all orders but the one there is


@dataclass(frozen=True)
class WordOrder(Objective):
    """-sum log p(x_1, x_2, x_3 | the rest, and these three in another order) over shuffled
    trigrams (Wang et al., arXiv 1908.04577, eq. 1, K = 3).

    Of the trigrams of the text ``rate`` are shuffled, none on another, each into one of its five
    other orders; only tokens that are not masked take part. The masked-LM head predicts what stood
    at each of the places.
    """

    name = "word-order"
    paper = "StructBERT, arXiv 1908.04577"
    summary = "the order of shuffled trigrams"
    head_name = "lm"

    rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0 / _SIZE:
            raise ValueError(f"rate: got {self.rate!r}, expected 0 < rate <= 1/3")

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        wanted = max(1, round(self.rate * _trigrams(example.ordinary).size))
        chosen: list[int] = []
        taken = bytearray(len(example) + _SIZE)
        for start in rng.permutation(_trigrams(example.free)).tolist():
            if len(chosen) == wanted:
                break
            if not any(taken[start : start + _SIZE]):
                taken[start : start + _SIZE] = b"\1" * _SIZE
                chosen.append(start)
        starts = np.sort(np.array(chosen, np.int64))
        places = starts[:, None] + np.arange(_SIZE)
        order = _SHUFFLES[rng.integers(len(_SHUFFLES), size=len(starts))]
        labels = example.ids[places]
        ids, group = example.ids.copy(), example.group.copy()
        ids[places] = np.take_along_axis(labels, order, 1)
        group[places] = group.max() + 1 + np.arange(len(starts))[:, None]
        return example.replace(ids=ids, group=group).asking(
            self.name, index=places.ravel(), labels=labels.ravel()
        )

    def head(self, config: BertConfig) -> LMPredictions:
        return LMPredictions(config)

    def terms(self, head: LMPredictions, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        return {"": predict_tokens(head, encoded, targets["index"], targets["labels"])}


def _trigrams(usable: np.ndarray) -> np.ndarray:
    """Where three usable tokens begin."""
    return np.flatnonzero(usable[:-2] & usable[1:-1] & usable[2:])
