"""BART's noise, undone by an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastbert.config import BertConfig
from fastbert.pretrain.collate import PretrainingBatch
from fastbert.pretrain.examples import NONE, Example, Vocabulary, frame
from fastbert.pretrain.objectives.boundary import OffsetDecoder
from fastbert.pretrain.objectives.objective import (
    CORRUPT,
    Encoded,
    Objective,
    Targets,
    Term,
    binary_term,
    class_term,
)
from fastbert.pretrain.spans import place_spans
from fastbert.train.flops import matrix_weights

Array = np.ndarray

# Columns of the table that goes through the noise, a row for each token of the noised text: the row
# of the text that it is or stands for, whether it is a [MASK] or inserted, and the span that is
# missing at it or behind it (NONE for none).
_ROW, _MASK, _INSERTED, _SPAN = range(4)


@dataclass(frozen=True)
class Denoising(Objective):
    """Text noised as in BART, in the order of its code (Lewis et al., arXiv 1910.13461, section
    2.2), and heads that tell what was done to it. BART's decoder writes the text anew; an encoder
    has none, so chosen here are

    permute   Sentences come in random order. Told: the number that each had, at its first token.
    rate      So much of the tokens is taken out in spans of Poisson(mean_span), each of which
              leaves one [MASK]; one of length 0 is a [MASK] put in. Told: the length, at each
              [MASK], and each missing token, from the [MASK]'s state and its offset in the span.
    delete    Of these spans, so many leave nothing. Told: the length, now asked at every token: of
              what is missing there or behind it; and the tokens as before.
    insert    So much of the tokens is put in between, random ones. Told: at every token, whether it
              was.
    rotate    So many examples begin at a random token. Told: where the text began, by a softmax
              over the tokens of the sequence.

    A noise of rate 0 has no head. The defaults are those of the published model.
    longest: spans are cut to it (Poisson(3) goes beyond 10 once in 3,400).
    sentences: those behind the first so many have no target.
    Text that consists of several documents or segments becomes one.
    """

    name = "bart"
    paper = "BART, arXiv 1910.13461"
    summary = "what noise took out, put in and moved"
    stage = CORRUPT
    alone = True

    permute: bool = True
    rate: float = 0.3
    mean_span: float = 3.0
    delete: float = 0.0
    insert: float = 0.0
    rotate: float = 0.0
    longest: int = 10
    sentences: int = 32

    def __post_init__(self) -> None:
        for name in ("rate", "delete", "insert", "rotate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected 0 .. 1")
        for name in ("mean_span", "longest", "sentences"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected 1 or more")

    # --- noise --------------------------------------------------------------------------------

    def prepare(
        self, example: Example, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        text = example.take(np.flatnonzero(example.ordinary))
        if self.permute:
            text = _permuted(text, rng)
        lengths = self._span_lengths(len(text), rng)
        span, starts = place_spans(len(text), lengths, rng)
        table = self._infilled(span, starts, lengths, rng)
        table = self._inserted(table, rng)
        table, first = self._rotated(table, rng)

        noised = text.take(table[:, _ROW])
        noised.ids[table[:, _MASK] == 1] = vocabulary.special.mask
        inserted = np.flatnonzero(table[:, _INSERTED])
        drawn = rng.integers(len(vocabulary.ordinary), size=len(inserted))
        noised.ids[inserted] = vocabulary.ordinary[drawn]
        framed = frame([noised], vocabulary.special)
        targets = self._missing(text, span, lengths, table)
        if self.permute:
            targets |= self._order(noised.sentence, table, first)
        if self.insert:
            targets |= {"inserted_index": 1 + np.arange(len(table)),
                        "inserted": table[:, _INSERTED] == 1}  # fmt: skip
        if self.rotate:
            targets |= {"start_index": np.arange(len(framed)), "start": np.array([1 + first])}
        return framed.asking(self.name, **targets)

    def _span_lengths(self, tokens: int, rng: np.random.Generator) -> Array:
        """Lengths that add up to ``rate`` of the tokens, the last one cut."""
        budget = round(self.rate * tokens)
        drawn = np.zeros(0, np.int64)
        if not budget:
            return drawn
        while drawn.sum() < budget:
            more = rng.poisson(self.mean_span, size=1 + budget)
            drawn = np.concatenate((drawn, np.minimum(more, self.longest)))
        drawn = drawn[: np.searchsorted(np.cumsum(drawn), budget) + 1]
        drawn[-1] -= drawn.sum() - budget
        # Between two spans a token is left.
        room = np.cumsum(drawn) + np.arange(len(drawn)) <= tokens
        return drawn[: int(room.sum())]

    def _infilled(
        self, span: Array, starts: Array, lengths: Array, rng: np.random.Generator
    ) -> Array:
        deleted = (rng.random(len(starts)) < self.delete) & (lengths > 0)
        kept, masks = np.flatnonzero(span == NONE), np.flatnonzero(~deleted)
        # A [MASK] comes before the first token that it stands for.
        keys = np.concatenate((kept, starts[masks] - 0.5))
        order = np.argsort(keys)
        table = np.zeros((len(keys), 4), np.int64)
        standing_for = np.minimum(starts[masks], len(span) - 1)
        table[:, _ROW] = np.concatenate((kept, standing_for))[order]
        table[:, _MASK] = order >= len(kept)
        table[:, _SPAN] = np.concatenate((np.full(len(kept), NONE), masks))[order]
        # What was deleted is missing behind the token before it; at the very front, behind [CLS].
        gone = np.flatnonzero(deleted)
        before = np.searchsorted(keys[order], starts[gone]) - 1
        table[before[before >= 0], _SPAN] = gone[before >= 0]
        return table

    def _inserted(self, table: Array, rng: np.random.Generator) -> Array:
        count = round(self.insert * len(table))
        if not count:
            return table
        before = np.sort(rng.integers(len(table), size=count))
        new = np.zeros((count, 4), np.int64)
        new[:, _ROW] = table[before, _ROW]
        new[:, _INSERTED], new[:, _SPAN] = 1, NONE
        return np.insert(table, before, new, axis=0)

    def _rotated(self, table: Array, rng: np.random.Generator) -> tuple[Array, int]:
        """The table, and the place in it with which it began before."""
        if not len(table) or rng.random() >= self.rotate:
            return table, 0
        shift = int(rng.integers(len(table)))
        return np.roll(table, -shift, axis=0), (len(table) - shift) % len(table)

    def _missing(
        self, text: Example, span: Array, lengths: Array, table: Array
    ) -> dict[str, Array]:
        """The targets of the spans; places count [CLS]."""
        at = np.zeros(len(lengths), np.int64)  # [CLS] unless the table has the span
        holders = np.flatnonzero(table[:, _SPAN] != NONE)
        at[table[holders, _SPAN]] = 1 + holders
        hidden = np.flatnonzero(span != NONE)
        owner = span[hidden]
        targets = {
            "slot_index": at[owner],
            "offset": np.arange(len(hidden)) - np.searchsorted(owner, owner),
            "tokens": text.ids[hidden],
        }
        if not self.delete:
            order = np.argsort(at)
            return targets | {"length_index": at[order], "lengths": lengths[order]}
        missing = np.zeros(len(table) + 1, np.int64)
        missing[at] = lengths
        return targets | {"length_index": np.arange(len(missing)), "lengths": missing}

    def _order(self, sentence: Array, table: Array, first: int) -> dict[str, Array]:
        """The targets of the sentences, at what is left of each: its first token or [MASK] as of
        before the rotation. A sentence that was all in the span of another has none."""
        own = np.flatnonzero(np.roll(table[:, _INSERTED], -first) == 0)
        number, at = np.unique(np.roll(sentence, -first)[own], return_index=True)
        place = (own[at] + first) % max(1, len(table))
        order = np.argsort(place)
        order = order[number[order] < self.sentences]
        return {"order_index": 1 + place[order], "order": number[order]}

    # --- heads --------------------------------------------------------------------------------

    def head(self, config: BertConfig) -> nn.ModuleDict:
        hidden = config.hidden_size
        heads: dict[str, nn.Module] = {
            "tokens": OffsetDecoder(config, inputs=1, offsets=self.longest),
            "length": nn.Linear(hidden, self.longest + 1),
        }
        if self.permute:
            heads["order"] = nn.Linear(hidden, self.sentences)
        if self.insert:
            heads["inserted"] = nn.Linear(hidden, 1)
        if self.rotate:
            heads["start"] = nn.Linear(hidden, 1)
        return nn.ModuleDict(heads)

    def counts(self, targets: Targets) -> dict[str, int]:
        labels = {"tokens": "tokens", "length": "lengths", "order": "order",
                  "inserted": "inserted", "start": "start"}  # fmt: skip
        return {term: len(targets[name]) for term, name in labels.items() if name in targets}

    def flops(self, head: Any, config: BertConfig, batch: PretrainingBatch) -> int:
        counts = self.counts(batch.targets[self.name])
        tokens = counts.pop("tokens") * head["tokens"].flops(config)
        return tokens + sum(2 * count * matrix_weights(head[k]) for k, count in counts.items())

    def terms(self, head: Any, encoded: Encoded, targets: Targets) -> dict[str, Term]:
        measure = encoded.measure
        slots = (encoded.states[targets["slot_index"]],)
        logits = head["length"](encoded.at(targets["length_index"]))
        terms = {
            "tokens": head["tokens"].term(slots, targets["offset"], targets["tokens"], encoded),
            "length": class_term(logits, targets["lengths"], measure),
        }
        if self.permute:
            logits = head["order"](encoded.at(targets["order_index"]))
            terms["order"] = class_term(logits, targets["order"], measure)
        if self.insert:
            logits = head["inserted"](encoded.at(targets["inserted_index"]))[:, 0]
            terms["inserted"] = binary_term(logits, targets["inserted"], measure)
        if self.rotate:
            scores = head["start"](encoded.at(targets["start_index"]))[:, 0]
            logits = encoded.inputs.unpack(scores, float("-inf"))
            terms["start"] = class_term(logits, targets["start"], measure)
        return terms


def _permuted(text: Example, rng: np.random.Generator) -> Example:
    """Sentences in random order, numbered 0, 1, … as they were."""
    begins = np.flatnonzero(np.diff(text.sentence, prepend=NONE))
    number = np.cumsum(np.diff(text.sentence, prepend=NONE) != 0) - 1
    order = rng.permutation(len(begins))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    rows = np.argsort(rank[number], kind="stable")
    return text.replace(sentence=number).take(rows)
