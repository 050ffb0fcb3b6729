"""PretrainingData: examples are a function of (seed, epoch, index), whoever makes them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastbert.data import Corpus, TokenBatches
from fastbert.pretrain import (
    Example,
    Masking,
    PretrainingBatch,
    PretrainingData,
    collate,
    open_source,
    parse,
)

COMBINATIONS = [
    ("mlm+nsp", "pairs"),
    ("mlm+sop+word-order", "pairs"),
    ("mlm+distance+reorder+capitalised+elsewhere", "pairs"),
    ("mlm+sbo", "segments"),
    ("rtd", "full-sentences"),
    ("plm", "segments"),
    ("unilm2", "segments"),
    ("bart", "segments"),
    ("mlm", "streams"),
]


def data_of(
    corpus: Corpus, text: str, kind: str, seed: int = 1, **options: object
) -> PretrainingData:
    what = "unit" if "capitalised" in text else "span" if "sbo" in text else "word"
    objectives = parse(text, None if text in ("rtd", "unilm2") else Masking(what=what),
                       {"bart": {"insert": 0.1, "delete": 0.2, "rotate": 0.5}})  # fmt: skip
    source = open_source(kind, corpus, 64, objectives, seed=7)
    return PretrainingData(source, objectives, seed=seed, **options)  # type: ignore[arg-type]


def same(x: Example, y: Example) -> bool:
    batches = [collate([z]) for z in (x, y)]
    return equal(*batches)


def equal(x: PretrainingBatch, y: PretrainingBatch) -> bool:
    def tensors(batch: PretrainingBatch) -> list[torch.Tensor | None]:
        own = [batch.rows, batch.visibility, batch.inputs.input_ids, batch.inputs.token_type_ids,
               batch.inputs.position_ids]  # fmt: skip
        return own + [t for targets in batch.targets.values() for t in targets.values()]

    return x.inputs.lengths == y.inputs.lengths and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(tensors(x), tensors(y), strict=True)
    )


@pytest.mark.parametrize("text, kind", COMBINATIONS)
def test_a_function_of_seed_epoch_and_index(documentation: Corpus, text: str, kind: str) -> None:
    """In any order, in a copy that went through a pipe, and not otherwise."""
    data = data_of(documentation, text, kind)
    order = np.random.default_rng(0).permutation(len(data))[:30].tolist()
    first = {i: data[i] for i in order}
    copy = pickle.loads(pickle.dumps(data))
    for i in reversed(order):
        assert same(copy[i], first[i])
    data.set_epoch(1)
    assert not all(same(data[i], first[i]) for i in order)
    data.set_epoch(0)
    assert all(same(data[i], first[i]) for i in order)
    other = data_of(documentation, text, kind, seed=2)
    assert not all(same(other[i], first[i]) for i in order)


def test_static_masks(documentation: Corpus) -> None:
    """BERT's: the same in every epoch."""
    static = data_of(documentation, "mlm+nsp", "pairs", static=True)
    before = [static[i] for i in range(20)]
    static.set_epoch(3)
    assert all(same(static[i], x) for i, x in enumerate(before))


@pytest.mark.parametrize("text, kind", [("mlm+nsp", "pairs"), ("rtd", "full-sentences")])
def test_workers_change_nothing(documentation: Corpus, text: str, kind: str) -> None:
    data = data_of(documentation, text, kind)
    batches = TokenBatches(data.lengths, 20_000, seed=3)

    def loaded(workers: int, epoch: int) -> list[PretrainingBatch]:
        data.set_epoch(epoch)
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
        return list(loader)

    alone = loaded(0, 0)
    assert len(alone) > 3
    assert all(equal(x, y) for x, y in zip(alone, loaded(2, 0), strict=True))
    assert not any(equal(x, y) for x, y in zip(alone, loaded(2, 1), strict=True))


def test_lengths_before_objectives(documentation: Corpus) -> None:
    data = data_of(documentation, "mlm", "streams")
    assert [len(data[i]) for i in range(20)] == data.lengths[:20].tolist()
    assert len(data) == len(data.lengths)
