"""XLNet's permutation language model on a BERT encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastbert.config import BertConfig
from fastbert.nn import LMPredictions
from fastbert.pretrain.encode import UNSEEN, visibility
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.objectives.masked import predict_tokens
from fastbert.pretrain.objectives.objective import CORRUPT, Encoded, Objective, Targets, Term


@dataclass(frozen=True)
class PermutationLM(Objective):
    """-sum_{t > c} log p(x_{z_t} | x_{z_1}, …, x_{z_{t-1}}) for a random order z of the ordinary
    tokens, of which the last 1 / ``k`` are predicted (Yang et al., arXiv 1906.08237, eq. 5).

    Two streams (section 2.3). The content stream is the sequence itself: the first c tokens of z
    and the special tokens see each other, as in the authors' code, and those behind see what comes
    before them in z and themselves. The query stream has a row for each predicted token, which is
    appended to the sequence: [MASK] at the token's position (the w of the paper), that sees the
    content of what comes before it in z, not its own, and that no other row sees. Both go through
    the same weights, and so an ordinary encoder with an attention mask computes both at once.

    What is BERT's here: absolute positions, and no memory of the segment before.
    """

    name = "plm"
    paper = "XLNet, arXiv 1906.08237"
    summary = "the last tokens of a random order, each from those before it"
    stage = CORRUPT
    head_name = "lm"
    masks_attention = True

    k: int = 6

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: got {self.k!r}, expected 1 or more")

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        length = len(example)
        free = np.flatnonzero(example.free)
        count = min(len(free), max(1, round(len(free) / self.k)))
        last = rng.permutation(free)[len(free) - count :]
        rank = np.zeros(length, np.int64)  # 0: among the first c, seen by all
        rank[last] = np.arange(1, count + 1)
        predicted = np.sort(last)

        content = visibility(length, seen_from=rank, sees_to=rank)
        query = visibility(count, seen_from=UNSEEN, sees_to=rank[predicted] - 1)
        group = np.where(rank > 0, rank, NONE)
        extended = append_rows(example.replace(group=group), predicted)
        extended.ids[length:] = vocabulary.special.mask
        return extended.replace(visibility=np.concatenate((content, query))).asking(
            self.name,
            index=np.arange(length, length + count),
            labels=example.ids[predicted],
        )

    def head(self, config: BertConfig) -> LMPredictions:
        return LMPredictions(config)

    def terms(self, head: LMPredictions, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        return {"": predict_tokens(head, encoded, targets["index"], targets["labels"])}


def append_rows(example: Example, rows: np.ndarray) -> Example:
    """The example with copies of some of its rows behind it, at the positions of these; objectives
    that ask about the text's tokens let the copies alone."""
    length = len(example)
    extended = example.take(np.concatenate((np.arange(length), rows)))
    extended.sentence[length:] = NONE
    positions = np.concatenate((np.arange(length), rows))
    return extended.replace(position_ids=positions)
