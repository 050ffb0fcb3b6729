"""Texts to token ids, by the tokenizer that lies beside a saved model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Pair = tuple[str, str]


class Sequences(NamedTuple):
    """Token ids, and token types, of each sequence: int64 arrays."""

    ids: list[Array]
    types: list[Array]

    @property
    def lengths(self) -> Array:
        return np.array([len(ids) for ids in self.ids], np.int64)


class TextReader:
    """A tokenizer.json that cuts texts to a model's longest sequence; safe in many threads.

    text: the file's content.  max_length: in tokens, special ones among them.
    """

    def __init__(self, text: bytes, max_length: int) -> None:
        self._text = text
        self.max_length = max_length
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[int, str], Any] = {}

    def read(self, texts: Sequence[str | Pair]) -> Sequences:
        """Each text or pair of texts with special tokens, cut to ``max_length``."""
        encodings = self._encoded(self._get(0, "longest_first"), texts)
        return Sequences(
            [np.array(e.ids, np.int64) for e in encodings],
            [np.array(e.type_ids, np.int64) for e in encodings],
        )

    def windows(self, text: str | Pair, stride: int | None) -> tuple[list[Any], int]:
        """All of ``text``, at most ``max_length`` tokens at a time, and how many neighbours share.

        Of a pair the second is cut.  stride: how many to share; None: a quarter of ``max_length``,
        or of the room that is left if that is less.  Raises ValueError where special tokens and the
        first of a pair leave no room for more than ``stride``.
        """
        room = self._room(text)
        shared = min(self.max_length // 4, room // 4) if stride is None else stride
        if not 0 <= shared < room:
            raise ValueError(
                f"stride: got {stride}, expected less than the {max(room, 0)} tokens that a window "
                f"of {self.max_length} has room for beside special tokens and a question"
            )
        strategy = "longest_first" if isinstance(text, str) else "only_second"
        (first,) = self._encoded(self._get(shared, strategy), [text])
        return [first, *first.overflowing], shared

    def _room(self, text: str | Pair) -> int:
        """Tokens of ``text``, or of the second of a pair, in one window."""
        tokenizer = self._get(0, "longest_first")
        if isinstance(text, str):
            return self.max_length - tokenizer.num_special_tokens_to_add(False)
        first = tokenizer.encode(text[0], add_special_tokens=False)
        return self.max_length - tokenizer.num_special_tokens_to_add(True) - len(first.ids)

    def _encoded(self, tokenizer: Any, texts: Sequence[str | Pair]) -> list[Any]:
        if len(texts) == 1:  # without waking a pool of threads
            (text,) = texts
            return [tokenizer.encode(*([text] if isinstance(text, str) else text))]
        return tokenizer.encode_batch(list(texts))

    def _get(self, stride: int, strategy: str) -> Any:
        """A tokenizer that cuts so. What it does is part of its state: one for each way to cut."""
        with self._lock:
            found = self._tokenizers.get((stride, strategy))
            if found is None:
                from tokenizers import Tokenizer

                found = Tokenizer.from_buffer(self._text)
                found.no_padding()
                found.enable_truncation(self.max_length, stride=stride, strategy=strategy)
                self._tokenizers[stride, strategy] = found
            return found


def given_ids(sequences: Sequence[Any]) -> Sequences:
    """Sequences of token ids, special ones included, as they are; ValueError for anything else."""
    ids = []
    for sequence in sequences:
        x = np.asarray(sequence)
        if x.ndim != 1 or (x.size and x.dtype.kind not in "iu"):
            raise ValueError(f"texts: got {sequence!r}, expected texts or lists of token ids")
        ids.append(x.astype(np.int64))
    return Sequences(ids, [np.zeros_like(x) for x in ids])
