"""A tiny tokenizer, and saved models of every task, for the runtime's tests."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import fastbert

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "cat", "sat", "on", "mat", "dog", "ran", "far", "##s", "##ing", "?", ".", ",")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """WordPiece over letters and a few words. Its own padding and truncation must not be used."""
    letters = string.ascii_lowercase
    names = [*SPECIAL, *letters, *("##" + c for c in letters if c != "s"), *WORDS]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_padding(length=20)
    made.enable_truncation(12)
    return made


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., tuple[Any, Path]]:
    """A function (class name, **config fields) -> a quantised model and the folder it lies in."""

    def make(name: str = "BertModel", scheme: str = "int8-dynamic", **changes: Any) -> Any:
        config = fastbert.BertConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=80, max_position_embeddings=24, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(fastbert, name)(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                is_norm = "LayerNorm" in key and key.endswith("weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.2)
        quantised = fastbert.quantize(model, scheme, tokenizer=tokenizer)
        folder = tmp_path / name
        quantised.save_pretrained(folder)
        return quantised, folder

    return make


TEXTS = [
    "the cat sat on the mat.",
    "",
    "dogs ran",
    "far, far",
    "the dog sat on the cats and the mat and ran far and sat there on the dog mat",
    "x",
]


@pytest.fixture
def texts() -> list[str]:
    """Short, empty, and longer than the model."""
    return list(TEXTS)


@pytest.fixture
def padded(tokenizer: Tokenizer) -> Callable[..., dict[str, torch.Tensor]]:
    """A function (texts or pairs, length) -> padded inputs, as another tokenizer run makes them."""

    def make(texts: list[Any], length: int = 24) -> dict[str, torch.Tensor]:
        again = Tokenizer.from_str(tokenizer.to_str())
        again.enable_truncation(length)
        again.enable_padding(length=length)
        encodings = again.encode_batch(texts)
        return {
            "input_ids": torch.tensor([e.ids for e in encodings]),
            "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
            "token_type_ids": torch.tensor([e.type_ids for e in encodings]),
        }

    return make
