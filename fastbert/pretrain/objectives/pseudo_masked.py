"""UniLMv2's pseudo-masked language model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastbert.config import BertConfig
from fastbert.nn import LMPredictions
from fastbert.pretrain.encode import UNSEEN, visibility
from fastbert.pretrain.examples import NONE, Example, Vocabulary
from fastbert.pretrain.masking import Masking
from fastbert.pretrain.objectives.masked import Masks, predict_tokens
from fastbert.pretrain.objectives.objective import Encoded, Targets, Term
from fastbert.pretrain.objectives.permutation import append_rows


def _unilm2_masking() -> Masking:
    # 15% of the tokens; 60% of the groups are one token, the others spans of 2 to 6 (section 3.1).
    return Masking(what="span", span=".6,.08,.08,.08,.08,.08")


@dataclass(frozen=True)
class PseudoMaskedLM(Masks):
    """L_AE + L_PAR (Bao et al., arXiv 2002.12804, eqs. 2 and 4), both from one pass:

    AE   -sum log p(x_m | x without all masked): the masked LM.
    PAR  -sum_i log p(x_{M_i} | x without all masked, x_{M_1}, …, x_{M_{i-1}}): the masked groups
         M_i, in a random order, each at once, from the context and the groups before.

    The sequence has the masked tokens as masked, M. Behind it stand, at the positions of the masked
    tokens, these tokens themselves, and a pseudo mask P each. Context and M see context and M. The
    tokens of group i see these, the groups before, and each other; P of group i sees the same, but
    each other's P in place of the tokens (section 3.3: M tells P where else something is missing).
    Nobody but P of the same group sees a P. [MASK] is the embedding of M and of P.
    """

    name = "unilm2"
    paper = "UniLMv2, arXiv 2002.12804"
    summary = "masked tokens, and masked spans one after the other"
    head_name = "lm"
    masks_attention = True

    masking: Masking = field(default_factory=_unilm2_masking)

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        length = len(example)
        group = self.masking.choose(example, vocabulary, rng)
        masked = np.flatnonzero(group != NONE)
        count = len(masked)
        groups, number = np.unique(group[masked], return_inverse=True)
        step = rng.permutation(len(groups))[number] + 1

        extended = append_rows(example.replace(group=group), np.concatenate((masked, masked)))
        ids = extended.ids
        ids[:length] = self.masking.corrupt(example.ids, group, vocabulary, rng)
        ids[length + count :] = self.masking.mask_id(vocabulary)
        rows = (
            visibility(length, seen_from=0, sees_to=0),
            visibility(count, seen_from=step, sees_to=step),
            visibility(count, seen_from=UNSEEN, sees_to=step - 1, block=step),
        )
        labels = example.ids[masked]
        return extended.replace(visibility=np.concatenate(rows)).asking(
            self.name,
            index=masked,
            pseudo_index=length + count + np.arange(count),
            labels=labels,
        )

    def head(self, config: BertConfig) -> LMPredictions:
        return LMPredictions(config)

    def counts(self, targets: Targets) -> dict[str, int]:
        return {"ae": len(targets["labels"]), "par": len(targets["labels"])}

    def terms(self, head: LMPredictions, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        labels = targets["labels"]
        return {
            "ae": predict_tokens(head, encoded, targets["index"], labels),
            "par": predict_tokens(head, encoded, targets["pseudo_index"], labels),
        }
