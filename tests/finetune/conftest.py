"""What tests of whole runs share: a tiny checkpoint, and data that it can learn."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import BertForMaskedLM
from fastbert.config import BertConfig
from fastbert.data.tokenizer import save_tokenizer

from ._samples import make_small_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of an untrained BERT of 2 layers of 32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_small_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


_SAYS = {"praise": ("good", "able"), "blame": ("bad", "unable")}


def write_reviews(path: Path, rows: int, seed: int) -> Path:
    """A csv whose label is told by one word of the text."""
    random = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label = str(random.choice(list(_SAYS)))
            words = list(random.choice(["the", "cat", "film", "was", "in", "new", "dog"], 5))
            words.insert(int(random.integers(6)), str(random.choice(_SAYS[label])))
            writer.writerow([" ".join(map(str, words)), label])
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training rows, development rows)"""
    folder = tmp_path_factory.mktemp("reviews")
    return write_reviews(folder / "train.csv", 96, 1), write_reviews(folder / "dev.csv", 40, 2)
