"""Masked language models: BERT, RoBERTa, whole words, SpanBERT's spans, ERNIE 1.0, XLM, …"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastbert.config import BertConfig
from fastbert.nn import LMPredictions
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.objectives.objective import (
    CORRUPT,
    Encoded,
    Objective,
    Targets,
    Term,
    token_term,
)


def predict_tokens(head: LMPredictions, encoded: Encoded, index: torch.Tensor,
                   labels: torch.Tensor) -> Term:  # fmt: skip
    """The masked-LM head on the states at ``index``, which ascends."""
    decoder = head.decoder
    hidden = head.transform(encoded.at(index))
    return token_term(hidden, decoder.weight, decoder.bias, labels, encoded.measure)


class Masks(Objective):
    """Base of those that mask tokens, as their option ``masking`` has it."""

    stage = CORRUPT
    masking: Masking

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"unit"} if self.masking.what == "unit" else ())

    @property
    def counts_tokens(self) -> bool:
        return self.masking.alpha > 0.0


@dataclass(frozen=True)
class MaskedLM(Masks):
    """-sum log p(x_m | x with all masked) over the masked tokens m (Devlin et al., arXiv
    1810.04805, section 3.1, task 1). What is masked, where and how: ``Masking``.

    A new mask is drawn each time that a sequence is fed (RoBERTa, arXiv 1907.11692, section 4.1)
    unless ``PretrainingData`` is told that masks are static.
    """

    name = "mlm"
    paper = "BERT, arXiv 1810.04805"
    summary = "masked tokens; see the maskings"
    head_name = "lm"

    masking: Masking = Masking()

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        group = self.masking.choose(example, vocabulary, rng)
        masked = np.flatnonzero(group != NONE)
        ids = self.masking.corrupt(example.ids, group, vocabulary, rng)
        labels = example.ids[masked]
        return example.replace(ids=ids, group=group).asking(self.name, index=masked, labels=labels)

    def head(self, config: BertConfig) -> LMPredictions:
        return LMPredictions(config)

    def terms(self, head: LMPredictions, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        return {"": predict_tokens(head, encoded, targets["index"], targets["labels"])}
