"""Sentences to token ids, fast: what stands between two blanks is tokenised once and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.tokenizer import token_dtype, word_starts, works_piecewise
from fastbert.data.units import Units

Array = np.ndarray

_MOST_PIECES = 1 << 20  # remembered; some 200 MB


class Encoded(NamedTuple):
    """Documents as arrays.

    tokens: (T,) uint16 or uint32.  capitalised: (T,) bool: the word of the token begins with a
    capital letter in the raw text.  sentence_lengths: (S,) int64, in tokens.
    document_lengths: (D,) int64, in sentences.  unit_starts, unit_ends: (U,) int64, in tokens.
    No sentence and no document is empty.
    """

    tokens: Array
    capitalised: Array
    sentence_lengths: Array
    document_lengths: Array
    unit_starts: Array
    unit_ends: Array


class Encoder:
    """Tokenises documents for a corpus: no special tokens, and those in the text as plain text.

    It holds a table of pieces of text that it has seen, each with its tokens; a word is looked up
    in about a tenth of the time that the tokenizer takes for it. See ``works_piecewise`` for why
    that changes nothing; where it would, sentences are the pieces.
    """

    def __init__(self, tokenizer: Tokenizer, units: Units | None = None) -> None:
        # [SEP] in a text is five characters that someone wrote.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._piecewise = works_piecewise(tokenizer)
        self._units = units
        self._word_starts = word_starts(tokenizer)
        self._dtype = token_dtype(len(self._word_starts))
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[str, int] = {}
        self._first = np.zeros(0, np.int64)  # slot -> where its tokens begin, how many there are
        self._length = np.zeros(0, np.int64)
        self._tokens = np.zeros(0, self._dtype)
        self._capitalised = np.zeros(0, bool)

    def encode(self, documents: Sequence[Sequence[str]]) -> Encoded:
        """documents: each a list of sentences; those without any token are left out."""
        sentences = [sentence for document in documents for sentence in document]
        if self._piecewise:
            parts = [sentence.split(" ") for sentence in sentences]
            pieces = [piece for part in parts for piece in part]
            counts = np.fromiter(map(len, parts), np.int64, len(parts))
        else:
            self._forget()  # a sentence hardly comes twice
            pieces, counts = sentences, np.ones(len(sentences), np.int64)
        slots = self._look_up(pieces)
        lengths = self._length[slots]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        # Where each token is taken from: its piece's first, plus its place within the piece.
        source = np.repeat(self._first[slots] - (ends - lengths), lengths) + np.arange(total)

        sentence_ends = np.concatenate(([0], ends))[np.cumsum(counts)]
        sentence_lengths = np.diff(sentence_ends, prepend=0)
        held = sentence_lengths > 0
        sizes = np.fromiter(map(len, documents), np.int64, len(documents))
        owner = np.repeat(np.arange(len(documents)), sizes)
        document_lengths = np.bincount(owner[held], minlength=len(documents))
        tokens = self._tokens[source]
        sentence_lengths = sentence_lengths[held]
        starts, unit_ends = (np.zeros(0, np.int64),) * 2
        if self._units is not None:
            starts, unit_ends = self._units.find(tokens, np.cumsum(sentence_lengths))
        return Encoded(
            tokens,
            self._capitalised[source],
            sentence_lengths,
            document_lengths[document_lengths > 0],
            starts,
            unit_ends,
        )

    def _look_up(self, pieces: list[str]) -> Array:
        unseen = set(pieces).difference(self._slots)
        if len(self._slots) + len(unseen) > _MOST_PIECES:
            self._forget()
            unseen = set(pieces)
        if unseen:
            self._learn(list(unseen))
        return np.fromiter(map(self._slots.__getitem__, pieces), np.int64, len(pieces))

    def _learn(self, pieces: list[str]) -> None:
        encoding = self._tokenizer.encode(pieces, is_pretokenized=True, add_special_tokens=False)
        tokens = np.array(encoding.ids, np.int64)
        owner = np.array(encoding.word_ids, np.int64)  # of pretokenised texts: which of them
        starts = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0]
        head = np.maximum.accumulate(np.where(self._word_starts[tokens], np.arange(len(tokens)), 0))
        where = zip(owner[head].tolist(), starts[head].tolist(), strict=True)
        capitalised = np.array([_is_capital(pieces[i][start]) for i, start in where], bool)
        lengths = np.bincount(owner, minlength=len(pieces))

        begin = len(self._slots)
        self._slots.update(zip(pieces, range(begin, begin + len(pieces)), strict=True))
        first = len(self._tokens) + np.cumsum(lengths) - lengths
        self._first = np.concatenate((self._first, first))
        self._length = np.concatenate((self._length, lengths))
        self._tokens = np.concatenate((self._tokens, tokens.astype(self._dtype)))
        self._capitalised = np.concatenate((self._capitalised, capitalised))


def _is_capital(character: str) -> bool:
    return character.isupper() or character.istitle()
