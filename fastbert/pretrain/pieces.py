"""The sentences of a corpus as sources see them: numbers of their tokens, in arrays."""

from __future__ import annotations

import numpy as np

from fastbert.data import Corpus

Array = np.ndarray

_BLOCK = 1 << 20


class Pieces:
    """The sentences of a corpus; one longer than ``longest`` tokens is cut into equal pieces.

    starts: (P + 1,) int64: the first token of each piece, and the number of all tokens.
    document_starts: (D,) int64: the first token of each document.
    document: (P,) int64, the document of each piece.
    first_piece: (D + 1,) int64: document d has the pieces first_piece[d] .. first_piece[d + 1].
    """

    def __init__(self, corpus: Corpus, longest: int) -> None:
        lengths = corpus.sentence_lengths()
        parts = -(-lengths // longest)
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        begins = np.repeat(np.cumsum(lengths) - lengths, parts)
        begins += part * np.repeat(lengths, parts) // np.repeat(parts, parts)
        self.starts = np.append(begins, lengths.sum())
        ends = np.cumsum(corpus.document_lengths())
        self.document_starts = np.concatenate(([0], ends[:-1]))
        self.first_piece = np.searchsorted(self.starts, np.concatenate(([0], ends)))
        self.document = np.repeat(np.arange(len(ends)), np.diff(self.first_piece))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def begins_document(self) -> Array:
        """(P,) bool: the piece is the first of its document."""
        return np.diff(self.document, prepend=-1) != 0

    @property
    def document_end(self) -> Array:
        """(P,) int64: the piece behind the last of its document."""
        return self.first_piece[self.document + 1]

    def numbers(self, first: int, end: int) -> Array:
        """(end - first,) int64: the number of each token's piece, from 0 at ``first``."""
        low = np.searchsorted(self.starts, first, side="right")
        high = np.searchsorted(self.starts, end, side="left")
        bounds = self.starts[low:high]
        return np.searchsorted(bounds, np.arange(first, end), side="right")

    def documents_in(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first, end) of the tokens of each document that has some in first .. end."""
        low = np.searchsorted(self.document_starts, first, side="right") - 1
        high = np.searchsorted(self.document_starts, end, side="left")
        bounds = [*self.document_starts[low : high + 1].tolist(), int(self.starts[-1])]
        return list(zip(bounds[: high - low], bounds[1:], strict=False))


def chain(following: Array) -> Array:
    """0, following[0], following[following[0]], … below P, for ``following`` (P,) ascending steps.

    Where each piece is given the one at which a sequence that began with it would end, these are
    the pieces with which the sequences of the corpus begin.
    """
    found: list[int] = []
    place = 0
    while place < len(following):
        base = place
        block = following[base : base + _BLOCK].tolist()  # numbers of Python: 10 times as fast
        while place - base < len(block):
            found.append(place)
            place = block[place - base]
    return np.array(found, np.int64)
