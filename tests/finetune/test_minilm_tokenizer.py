"""The real uncased BERT vocabulary: tokens and windows are those of the library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.data import load_tokenizer
from fastbert.demo import checkpoint
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS

TEXTS = (Path(__file__).read_text(encoding="utf-8") + " Ünïcode naïve 猫 ½ [SEP] \u200b").split(
    "\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint())


@pytest.mark.parametrize("max_length", [256, 16])
def test_texts(tokenizer: Tokenizer, max_length: int) -> None:
    texts = [text for text in TEXTS if text.strip()]
    rows = Table.of(text=texts, label=["a", "b"] * (len(texts) // 2) + ["a"] * (len(texts) % 2))
    task = TASKS["classify"].open(rows)
    features = task.encode(
        task.check(rows, BadRows()), tokenizer, max_length=max_length, stride=max_length // 4
    )
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(max_length, stride=max_length // 4)
    expected = [
        (row, window.ids)
        for row, encoding in enumerate(cutting.encode_batch(texts))
        for window in (encoding, *encoding.overflowing)
    ]
    found = [
        (int(features.row[i]), features[i]["input_ids"].tolist()) for i in range(len(features))
    ]
    assert found == expected


def test_every_word_that_stands_once_is_found_again(tokenizer: Tokenizer) -> None:
    """Positions of an answer, taken for logits, give back its characters."""
    context = " ".join(TEXTS)
    words = [word.strip("\"'()[]{},.:") for word in context.split()]
    words = [word for word in dict.fromkeys(words) if word and context.count(word) == 1]
    rows = Table.of(question=["where ?"] * len(words), context=[context] * len(words),
                    answers=words)  # fmt: skip
    task = TASKS["qa"].open(rows)
    rows = task.check(rows, BadRows(skip=True))
    features = task.encode(rows, tokenizer, max_length=128, stride=60)
    outputs = []
    for i in range(len(features)):
        example = features[i]
        logits = np.zeros((len(example["input_ids"]), 2), np.float32)
        logits[example["start_positions"], 0] = logits[example["end_positions"], 1] = 9
        outputs.append(logits)
    predictions = task.decode(outputs, features, rows)
    assert len(rows) > 50
    assert [p["answer"] for p in predictions] == rows.columns["answers"]
