"""int8 and bf16 inference on CPUs without torch: from texts to vectors, labels and answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastbert.runtime.encoder import Encoder
from fastbert.runtime.heads import Answer, Classification, TaggedToken

if TYPE_CHECKING:
    from fastbert.runtime.files import encode_file
    from fastbert.runtime.sentence import SentenceEncoder

__all__ = [
    "Answer",
    "Classification",
    "Encoder",
    "SentenceEncoder",
    "TaggedToken",
    "encode_file",
]

# What the first vector does not need is imported when it is asked for.
_HOMES = {
    "SentenceEncoder": "fastbert.runtime.sentence",
    "encode_file": "fastbert.runtime.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastbert.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
