"""Phrases and entities that are masked as one: read from a file, found among the tokens.

ERNIE 1.0 (Sun et al. 2019, arXiv 1904.09223, section 3.2) masks whole phrases and entities; what
they are comes from outside, here as a list of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.files import Problems, lines
from fastbert.data.tokenizer import special_ids, word_starts

Array = np.ndarray

_END = -1  # in a node of the trie: a unit ends here


class Units:
    """A list of phrases, and where they occur.

    phrases: texts, which ``tokenizer`` reads as it reads the corpus: case and accents matter where
    they matter to it. One that holds an unknown token could stand for anything, and is left out.
    """

    def __init__(self, phrases: Iterable[str], tokenizer: Tokenizer) -> None:
        self._word_starts = word_starts(tokenizer)
        self._trie: dict[int, Any] = {}
        unknown = special_ids(tokenizer).unk
        self.count = 0
        for phrase in phrases:
            ids = tokenizer.encode(phrase, add_special_tokens=False).ids
            if ids and unknown not in ids:
                self.count += self._add(ids)
        self._first = np.zeros(len(self._word_starts), bool)
        self._first[list(self._trie)] = True

    def _add(self, ids: list[int]) -> bool:
        node = self._trie
        for token in ids:
            node = node.setdefault(token, {})
        new = _END not in node
        node[_END] = True
        return new

    def find(self, tokens: Array, sentence_ends: Array) -> tuple[Array, Array]:
        """First token and end of each unit: (U,) int64 each, ascending and apart.

        tokens: (T,).  sentence_ends: (S,) ascending, the last is T; no unit goes beyond one.
        From left to right the longest unit is taken; it begins and ends with a whole word.
        """
        begins_word = self._word_starts[tokens]
        # A unit may end before any token that begins a word, and where a sentence does.
        may_end = np.append(begins_word, True)
        may_end[sentence_ends] = True
        ends_word = may_end.tolist()
        candidates = np.flatnonzero(self._first[tokens] & begins_word)
        limits = sentence_ends[np.searchsorted(sentence_ends, candidates, side="right")]
        ids = tokens.tolist()
        found: list[tuple[int, int]] = []
        free = 0
        for start, limit in zip(candidates.tolist(), limits.tolist(), strict=True):
            if start < free:
                continue
            node, longest = self._trie, 0
            for place in range(start, limit):
                if ids[place] not in node:
                    break
                node = node[ids[place]]
                if _END in node and ends_word[place + 1]:
                    longest = place + 1
            if longest:
                found.append((start, longest))
                free = longest
        spans = np.array(found, np.int64).reshape(-1, 2)
        return spans[:, 0], spans[:, 1]


def read_phrases(path: Path) -> list[str]:
    """The phrases of a file of UTF-8, one a line.

    .jsonl: a text, or an object with a text in its field ``text``.  .tsv, .txt: the first column.
    Raises ValueError that names file and line.
    """
    if path.suffix not in (".jsonl", ".tsv", ".txt"):
        raise ValueError(f"units: got {path}, expected a .jsonl, .tsv or .txt file")
    if not path.is_file():
        raise FileNotFoundError(f"units: {path}: no such file")
    phrases = []
    with path.open("rb") as file:
        for number, line in lines(file, str(path), Problems(skip=False)):
            if line.strip():
                where = f"{path}: line {number}"
                phrase = _of_json(line, where) if path.suffix == ".jsonl" else line.split("\t")[0]
                if not phrase.strip():
                    raise ValueError(f"{where}: holds no phrase")
                phrases.append(phrase)
    if not phrases:
        raise ValueError(f"units: {path} holds no phrase")
    return phrases


def _of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    phrase = value.get("text") if isinstance(value, dict) else value
    if not isinstance(phrase, str):
        raise ValueError(f"{where}: expected a text or an object with a text in its field 'text'")
    return phrase


def digest(phrases: list[str]) -> str:
    """SHA-256 that tells one list of phrases from another."""
    return hashlib.sha256("\n".join(phrases).encode()).hexdigest()
