"""Text to token ids on disk, and back as batches: sources, tokenizer, shards, corpus, batching.

``prepare`` makes a corpus folder of any text, ``Corpus`` reads it, ``TokenBatches`` cuts what a
collator makes of it into batches of a number of tokens. Preparing needs no torch: the names of
``fastbert.data.batching``, which does, are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastbert.data.corpus import Corpus
from fastbert.data.prepare import Prepared, prepare
from fastbert.data.sources import read_documents
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from fastbert.data.batching import TokenBatches, batches_by_tokens, pack

__all__ = [
    "Corpus",
    "Prepared",
    "TokenBatches",
    "batches_by_tokens",
    "load_tokenizer",
    "pack",
    "prepare",
    "read_documents",
    "save_tokenizer",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in ("TokenBatches", "batches_by_tokens", "pack"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("fastbert.data.batching"), name)
    globals()[name] = value  # found directly from now on
    return value
