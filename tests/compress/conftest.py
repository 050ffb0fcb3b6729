"""Tiny native models, tokenizers and folders for the tests of compression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastbert

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread(one_thread: None) -> None:
    """Most models here are tiny."""


@pytest.fixture
def native() -> Callable[..., Any]:
    """A function (class name, **config fields) -> a native model with weights that matter."""

    def make(name: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        model = getattr(fastbert, name)(fastbert.BertConfig(**{**TINY, **changes}))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                is_norm = "LayerNorm" in key and key.endswith("weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.1)
        return model.eval()

    return make


@pytest.fixture
def batches() -> list[fastbert.PackedBatch]:
    """A few packed batches of random tokens for those models."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 97, (length,), generator=generator).tolist()

    lengths = ((11, 1, 7, 4), (40,), (3, 0, 9))
    return [fastbert.PackedBatch.from_sequences([ids(n) for n in row]) for row in lengths]
