"""SegmentPairs: two segments and what one is to the other, for objectives on pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbert.data import Corpus
from fastbert.pretrain.examples import NONE, Example, frame
from fastbert.pretrain.pieces import chain
from fastbert.pretrain.sources import Source, checked_short, random_rooms

Array = np.ndarray

RELATIONS = ("next", "previous", "same", "other")
_ALONE = NONE  # the relation of an example that has one segment only


class SegmentPairs(Source):
    """[CLS] A [SEP] B [SEP], about half of the room each (Devlin et al., arXiv 1810.04805, appendix
    A.2, and Google's code).

    A chunk is sentences of one document, as many as reach the room there is, or the document's end;
    A is the first 1 .. n - 1 of its n sentences. What B is, each of the ``relations`` as often:

    next      the rest of the chunk
    previous  the same, but B comes first (so the second segment is the one before the first)
    same      as much of the same document, from a random sentence on, not beside A (ERNIE 2.0's
              sentence distance); ``other`` where there is none
    other     as much of another document, from a random sentence on

    After ``same`` and ``other`` the next chunk begins behind A: the rest was not used. A chunk of
    one sentence cannot be parted: its relation is ``other`` if that is one of them, or else it has
    no B and no relation. What is too long for the sequence is cut from the longer of the two, token
    by token, at its front or its back, either with probability 1/2.

    relations: of the above, in the order of the labels: ``example.relation`` is a place in it.
    short: see ``Segments``.
    """

    name = "pairs"
    paper = "BERT, arXiv 1810.04805"
    summary = "two segments, as nsp, sop, 3way and distance need them"
    specials = 3

    def __init__(
        self,
        corpus: Corpus,
        max_length: int,
        *,
        relations: tuple[str, ...] = ("next", "other"),
        short: float = 0.1,
        **options: Any,
    ) -> None:
        if not relations or not set(relations) <= set(RELATIONS):
            raise ValueError(f"relations: got {relations}, expected some of {RELATIONS}")
        if "same" in relations and "other" not in relations:
            raise ValueError("relations: got same without other, which it may have to become")
        if "other" in relations and corpus.num_documents < 2:
            raise ValueError("relations: got other, which takes a corpus of 2 documents or more")
        self.relations = relations
        self.short = checked_short(short)
        super().__init__(corpus, max_length, **options)

    def _plan(self, rng: np.random.Generator) -> Array:
        """Rows: first token and end of A, first token and end of B (equal for none), relation."""
        pieces, starts = self.pieces, self.pieces.starts
        count = len(pieces)
        # As if a chunk began with each of the sentences.
        room = random_rooms(rng, count, self.room, self.short)
        reaching = np.searchsorted(starts, starts[:-1] + room)
        chunk_end = np.minimum(reaching, pieces.document_end)
        here = np.arange(count)
        sentences = chunk_end - here
        a_end = here + 1 + (rng.random(count) * (sentences - 1)).astype(np.int64)
        relation = rng.integers(len(self.relations), size=count)
        other = self.relations.index("other") if "other" in self.relations else _ALONE
        relation[sentences == 1] = other
        kinds = np.array([*self.relations, "alone"])
        if "same" in self.relations:
            impossible = (kinds[relation] == "same") & (self._same_places(here, a_end) == 0)
            relation[impossible] = other
        uses_rest = np.isin(kinds[relation], ("next", "previous"))
        first = chain(np.where(uses_rest, chunk_end, a_end))

        a_end, relation, room = a_end[first], relation[first], room[first]
        kind = kinds[relation]
        b, b_end = a_end.copy(), a_end.copy()
        b_end[uses_rest[first]] = chunk_end[first][uses_rest[first]]
        wanted = np.maximum(1, room - (starts[a_end] - starts[first]))
        for name, draw in (("same", self._draw_same), ("other", self._draw_other)):
            rows = np.flatnonzero(kind == name)
            b[rows], b_end[rows] = draw(rng, first[rows], a_end[rows], wanted[rows])
        return np.stack((starts[first], starts[a_end], starts[b], starts[b_end], relation), 1)

    def _same_places(self, first: Array, a_end: Array) -> Array:
        """How many sentences of the document lie neither in A nor beside it."""
        pieces = self.pieces
        document = pieces.document[first]
        before = np.maximum(0, first - 1 - pieces.first_piece[document])
        return before + np.maximum(0, pieces.first_piece[document + 1] - a_end - 1)

    def _draw_same(
        self, rng: np.random.Generator, first: Array, a_end: Array, wanted: Array
    ) -> tuple[Array, Array]:
        pieces = self.pieces
        document = pieces.document[first]
        start, end = pieces.first_piece[document], pieces.first_piece[document + 1]
        before = np.maximum(0, first - 1 - start)
        drawn = (rng.random(len(first)) * self._same_places(first, a_end)).astype(np.int64)
        b = np.where(drawn < before, start + drawn, a_end + 1 + drawn - before)
        return b, self._reach(b, wanted, np.where(drawn < before, first - 1, end))

    def _draw_other(
        self, rng: np.random.Generator, first: Array, a_end: Array, wanted: Array
    ) -> tuple[Array, Array]:
        pieces = self.pieces
        own = pieces.document[first]
        other = rng.integers(len(pieces.document_starts) - 1, size=len(first))
        other += other >= own
        start, end = pieces.first_piece[other], pieces.first_piece[other + 1]
        b = start + (rng.random(len(first)) * (end - start)).astype(np.int64)
        return b, self._reach(b, wanted, end)

    def _reach(self, piece: Array, wanted: Array, limit: Array) -> Array:
        """The end of the sentences from ``piece`` on that hold ``wanted`` tokens, or ``limit``."""
        starts = self.pieces.starts
        return np.minimum(np.searchsorted(starts, starts[piece] + wanted), limit)

    def _lengths(self) -> Array:
        a, a_end, b, b_end, _ = self._rows.T
        self._kept = np.stack(kept_tokens(a_end - a, b_end - b, self.room), 1)
        return self._kept.sum(1) + np.where(self._kept[:, 1] > 0, 3, 2)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        a, a_end, b, b_end, relation = self._rows[index].tolist()
        kept_a, kept_b = self._kept[index].tolist()
        segments = [self._cut(a, a_end, kept_a, rng)]
        if b_end > b:
            segments.append(self._cut(b, b_end, kept_b, rng))
        if relation != _ALONE and self.relations[relation] == "previous":
            segments.reverse()
        return frame(segments, self.vocabulary.special).replace(relation=relation)

    def _cut(self, first: int, end: int, kept: int, rng: np.random.Generator) -> Example:
        """``kept`` tokens of a segment; each of those cut comes off its front or its back."""
        excess = end - first - kept
        front = int(rng.binomial(excess, 0.5)) if excess else 0
        return self.text(first + front, first + front + kept)


def kept_tokens(a: Array, b: Array, room: int) -> tuple[Array, Array]:
    """How many tokens are left of segments of ``a`` and ``b`` when all but ``room`` are cut: each
    one from the longer, from B where they are as long."""
    excess = np.maximum(0, a + b - room)
    longer = np.minimum(excess, abs(a - b))
    turns = excess - longer  # both are as long now; B comes first
    return (
        a - np.where(a > b, longer, 0) - turns // 2,
        b - np.where(b > a, longer, 0) - (turns + 1) // 2,
    )
