"""fastbert: a fast BERT encoder on hand-written kernels, and a drop-in for Hugging Face models.

The public names below are imported when first asked for: ``import fastbert`` alone loads no torch,
touches no device and takes a few milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.compress.quantize import quantize
    from fastbert.compress.saved import load
    from fastbert.config import BertConfig
    from fastbert.hf.dropin import accelerate, restore
    from fastbert.hf.explain import explain
    from fastbert.hf.verify import verify
    from fastbert.models import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
    )
    from fastbert.ops import use_backend
    from fastbert.packed import PackedBatch
    from fastbert.train.graphs import graphs

    __version__: str

# Public name -> the module that defines it.
_HOMES = {
    "accelerate": "fastbert.hf",
    "restore": "fastbert.hf",
    "explain": "fastbert.hf",
    "verify": "fastbert.hf",
    "quantize": "fastbert.compress",
    "load": "fastbert.compress",
    "use_backend": "fastbert.ops",
    "PackedBatch": "fastbert.packed",
    "graphs": "fastbert.train",
    "BertConfig": "fastbert.config",
    "BertModel": "fastbert.models",
    "BertForPreTraining": "fastbert.models",
    "BertForMaskedLM": "fastbert.models",
    "BertForNextSentencePrediction": "fastbert.models",
    "BertForSequenceClassification": "fastbert.models",
    "BertForTokenClassification": "fastbert.models",
    "BertForQuestionAnswering": "fastbert.models",
    "BertForMultipleChoice": "fastbert.models",
}

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "PackedBatch",
    "__version__",
    "accelerate",
    "explain",
    "graphs",
    "load",
    "quantize",
    "restore",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """As pyproject.toml says it, read from the installed package's metadata."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version("fastbert")
    except metadata.PackageNotFoundError:
        return "0+not.installed"
