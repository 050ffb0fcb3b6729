"""Corpus: the folder that ``fastbert prepare`` writes, open for reading.

    corpus/
      corpus.json                   what it is made of, its splits and their shards with checksums
      tokenizer/                    Hugging Face: tokenizer.json, tokenizer_config.json, vocab.txt
      train/00000.safetensors, …
      valid/00000.safetensors, …    the held-out documents

``fastbert.data.shards`` describes a shard. Files are mapped, not read: any number of processes
share one copy of what they use, and a corpus may be larger than memory.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.atomic import replacing
from fastbert.data import tokenizer as tokenizers
from fastbert.data.shards import Shard, ShardRecord

Array = np.ndarray

FACTS = "corpus.json"
FORMAT, FORMAT_VERSION = "fastbert-corpus", 1
TOKENIZER = "tokenizer"
SPLITS = ("train", "valid")


class Corpus:
    """One split of a corpus.

    folder: what ``prepare`` wrote.  split: ``train`` or ``valid``.

    Tokens, sentences and documents are numbered from 0 through all shards of the split. Arrays are
    read-only views of the files unless they reach over the end of one. A Corpus can be pickled and
    used after a fork: a process opens or inherits the same mappings.

    Raises ValueError, naming the file, for what is no corpus, is not finished, or is damaged as far
    as sizes tell (``verify`` reads everything); a FileNotFoundError for what is missing.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        self.folder = Path(folder)
        self.split = split
        facts = read_facts(self.folder)
        if not facts["complete"]:
            raise ValueError(
                f"{self.folder}: this corpus is not finished: the command that began it goes on "
                "where it stopped"
            )
        self._fingerprint: str = facts["tokenizer"]["sha256"]
        self.vocab_size: int = facts["tokenizer"]["vocab_size"]
        self.has_units: bool = facts["made_of"]["units"] is not None
        records = [ShardRecord(**record) for record in facts["splits"][split]]
        self._shards = [
            Shard(self.folder / r.file, r, self.vocab_size, units=self.has_units) for r in records
        ]
        self._token_starts = _starts(record.tokens for record in records)
        self._sentence_starts = _starts(record.sentences for record in records)
        self._document_starts = _starts(record.documents for record in records)

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.folder, self.split)

    @property
    def num_tokens(self) -> int:
        return self._token_starts[-1]

    @property
    def num_sentences(self) -> int:
        return self._sentence_starts[-1]

    @property
    def num_documents(self) -> int:
        return self._document_starts[-1]

    # --- what is where ------------------------------------------------------------------------

    def document_span(self, document: int) -> tuple[int, int]:
        """(first, end) of its sentences. Raises IndexError."""
        shard, place = _find(self._document_starts, document, "document")
        first = self._sentence_starts[shard]
        offsets = self._shards[shard].document_offsets
        return first + int(offsets[place]), first + int(offsets[place + 1])

    def sentence_span(self, sentence: int) -> tuple[int, int]:
        """(first, end) of its tokens. Raises IndexError."""
        shard, place = _find(self._sentence_starts, sentence, "sentence")
        first = self._token_starts[shard]
        offsets = self._shards[shard].sentence_offsets
        return first + int(offsets[place]), first + int(offsets[place + 1])

    def sentence_lengths(self) -> Array:
        """(S,) int64: tokens of each sentence."""
        parts = [np.diff(shard.sentence_offsets) for shard in self._shards]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def document_lengths(self) -> Array:
        """(D,) int64: tokens of each document."""
        parts = [np.diff(s.sentence_offsets[s.document_offsets]) for s in self._shards]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    # --- content ------------------------------------------------------------------------------

    def document(self, document: int) -> list[Array]:
        """The tokens of each of its sentences."""
        return [self.sentence(sentence) for sentence in range(*self.document_span(document))]

    def sentence(self, sentence: int) -> Array:
        """(n,) uint16 or uint32: its tokens."""
        return self.tokens(*self.sentence_span(sentence))

    def tokens(self, first: int, end: int) -> Array:
        """(end - first,) uint16 or uint32: the tokens from ``first`` on, whatever they belong to.

        Raises IndexError for a span that is not in the corpus.
        """
        dtype = tokenizers.token_dtype(self.vocab_size)
        parts = [shard.tokens[a:b] for shard, a, b, _ in self._pieces(first, end)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])

    def capitalised(self, first: int, end: int) -> Array:
        """(end - first,) bool: whether the word of each token began with a capital letter."""
        parts = [np.zeros(0, bool)]
        for shard, a, b, _ in self._pieces(first, end):
            bits = np.unpackbits(shard.capitalised[a // 8 : -(-b // 8)], bitorder="little")
            parts.append(bits[a % 8 : a % 8 + b - a].astype(bool))
        return np.concatenate(parts)

    def units(self, first: int, end: int) -> Array:
        """(U, 2) int64: first token and end of each unit that lies in first .. end, less ``first``.

        Ascending and apart; none in a corpus that was made without units (``has_units``).
        """
        parts = [np.zeros((0, 2), np.int64)]
        for shard, a, b, shift in self._pieces(first, end) if self.has_units else ():
            low = np.searchsorted(shard.unit_starts, a)
            high = np.searchsorted(shard.unit_ends, b, side="right")
            spans = np.stack((shard.unit_starts[low:high], shard.unit_ends[low:high]), 1)
            parts.append(spans + (shift - first))
        return np.concatenate(parts)

    def _pieces(self, first: int, end: int) -> list[tuple[Shard, int, int, int]]:
        """(shard, first and end of its tokens, number of its token 0) of each shard of a span."""
        if not 0 <= first <= end <= self.num_tokens:
            raise IndexError(f"tokens {first} .. {end} are not among the {self.num_tokens}")
        pieces = []
        shard = bisect_right(self._token_starts, first) - 1
        while first < end:
            shift, behind = self._token_starts[shard : shard + 2]
            stop = min(end, behind)
            if first < stop:
                pieces.append((self._shards[shard], first - shift, stop - shift, shift))
            first, shard = stop, shard + 1
        return pieces

    # --- vocabulary ---------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus. Raises ValueError if it is not the one that made it."""
        folder = self.folder / TOKENIZER
        tokenizer = tokenizers.load_tokenizer(folder)
        if tokenizers.fingerprint(folder) != self._fingerprint:
            raise ValueError(f"{folder}: is not the tokenizer that the corpus was made with")
        return tokenizer

    @cached_property
    def word_starts(self) -> Array:
        """(V,) bool: the token begins a word; false for the continuing pieces (``##``)."""
        return tokenizers.word_starts(self.tokenizer)

    @cached_property
    def special_ids(self) -> tokenizers.SpecialIds:
        return tokenizers.special_ids(self.tokenizer)

    @cached_property
    def token_counts(self) -> Array:
        """(V,) int64: how often each token occurs. Counted once, by reading all tokens."""
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in self._shards:
            for first in range(0, len(shard.tokens), _COUNTED):
                part = shard.tokens[first : first + _COUNTED]
                counts += np.bincount(part, minlength=self.vocab_size)
        return counts

    def verify(self) -> None:
        """Read every byte. Raises ValueError that names the first file that is not as written."""
        for shard in self._shards:
            shard.verify()
        _ = self.tokenizer


_COUNTED = 1 << 22  # tokens at a time: bincount makes them 8 bytes each


def _starts(counts: Iterable[int]) -> list[int]:
    return [0, *accumulate(counts)]


def _find(starts: list[int], item: int, what: str) -> tuple[int, int]:
    """(shard, number within it) of a document or sentence."""
    if not 0 <= item < starts[-1]:
        raise IndexError(f"{what} {item} is not among the {starts[-1]}")
    shard = bisect_right(starts, item) - 1
    return shard, item - starts[shard]


# --- corpus.json ------------------------------------------------------------------------------


def read_facts(folder: Path) -> dict[str, Any]:
    """What corpus.json says; a CRC-32 of itself vouches that it is as it was written."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: no such file, expected a folder that `fastbert prepare` wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path}: expected an object with format: {FORMAT}")
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if facts.get("crc32") != _digest(facts):
        raise ValueError(f"{path}: was changed or damaged: its crc32 is not that of its content")
    return facts


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write corpus.json, whole or not at all."""
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts}
    facts["crc32"] = _digest(facts)
    with replacing(folder / FACTS) as (temporary,):
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _digest(facts: Mapping[str, Any]) -> int:
    """CRC-32 of the facts without the one that is it."""
    rest = {key: value for key, value in facts.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
