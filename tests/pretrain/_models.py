"""Tiny models, and batches of tiny examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastbert import BertConfig
from fastbert.pretrain import (
    Example,
    Objective,
    PretrainingBatch,
    PretrainingModel,
    collate,
)

from ._samples import CLS, SEP, example, vocabulary

V = 40
WORDS = vocabulary(V)
CONFIG = BertConfig(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,  # so that attention is not nearly uniform
)


def model_of(objectives: Sequence[Objective], config: BertConfig = CONFIG) -> PretrainingModel:
    """In fp64, and with no bias or LayerNorm left at what it begins as."""
    torch.manual_seed(0)
    model = PretrainingModel(config, objectives).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def texts(*lengths: int, seed: int = 0) -> list[Example]:
    """[CLS] words [SEP] words [SEP] in two sentences each, with all columns."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(5, V, length)
        half = length // 2
        ids[0], ids[half], ids[-1] = CLS, SEP, SEP
        x = example(
            ids,
            sentence=np.arange(length) > half,
            unit=np.full(length, -1),
            capitalised=rng.random(length) < 0.3,
            elsewhere=rng.random(length) < 0.5,
        )
        x.token_type_ids[half + 1 :] = 1
        made.append(x.replace(relation=int(rng.integers(2))))
    return made


def batch_of(objectives: Sequence[Objective], examples: Sequence[Example]) -> PretrainingBatch:
    return collate(prepared_by(objectives, examples))


def prepared_by(objectives: Sequence[Objective], examples: Sequence[Example]) -> list[Example]:
    """The examples as prepared with one generator, so that they are the same in any batches."""
    rng = np.random.default_rng(5)
    prepared = []
    for x in examples:
        for objective in objectives:
            x = objective.prepare(x, WORDS, rng)
        prepared.append(x)
    return prepared
