"""A small tokenizer, tiny models and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.data.tokenizer import SPECIAL_TOKENS, make_tokenizer
from fastbert.finetune.features import Features
from fastbert.finetune.table import Table
from fastbert.finetune.tasks import Task

_WORDS = (
    "the cat sat on mat new york city a dog in of and ##s ##ing ##ly un ##able good bad film "
    "who where when is was 1 9 308 . , ! ? - ( ) ' ½ e cafe ##a ##b ##c é"
)


def make_small_tokenizer() -> Tokenizer:
    words = [*SPECIAL_TOKENS, *_WORDS.split(" ")]
    return make_tokenizer({word: i for i, word in enumerate(dict.fromkeys(words))}, True)


def tiny_model(task: Task, vocab_size: int = 60) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return task.model(config.replace(**task.config())).eval()


def run(task: Task, features: Features, batch: int = 3) -> list[np.ndarray]:
    """The outputs of a tiny model, from the last feature to the first."""
    model = tiny_model(task)
    outputs: dict[int, np.ndarray] = {}
    order = list(range(len(features)))[::-1]
    with torch.no_grad():
        for first in range(0, len(order), batch):
            indices = order[first : first + batch]
            inputs = task.collate([features[i] for i in indices])
            output = model(**inputs)
            if "labels" in inputs or "start_positions" in inputs:
                assert torch.isfinite(output.loss)
            outputs.update(zip(indices, task.split(output, inputs), strict=True))
    return [outputs[i] for i in range(len(features))]


def texts_of(features: Features, tokenizer: Tokenizer) -> list[str]:
    """The tokens of each feature with blanks between them."""
    return [
        " ".join(tokenizer.id_to_token(int(i)) for i in features[n]["input_ids"])
        for n in range(len(features))
    ]


def one_hot(places: Sequence[int], classes: int, high: float = 9.0) -> list[np.ndarray]:
    """Logits that say these classes."""
    return list(high * np.eye(classes, dtype=np.float32)[list(places)])


def table(**columns: Any) -> Table:
    return Table.of("train.csv", **columns)
