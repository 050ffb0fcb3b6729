"""Groups by decay and by depth."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fastbert
from fastbert.train import AdamW, param_groups

CONFIG = fastbert.BertConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, num_labels=3,
)  # fmt: skip


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Name -> (weight decay, lr_scale) of each parameter that is in a group, once."""
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        for p in group["params"]:
            assert names[p] not in found
            found[names[p]] = group["weight_decay"], group["lr_scale"]
    return found


def test_layer_norms_and_biases_do_not_decay() -> None:
    model = fastbert.BertForPreTraining(CONFIG)
    groups = by_name(model, param_groups(model, 0.01))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, (decay, scale) in groups.items():
        assert scale == 1.0
        assert decay == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.01), name


def test_layer_decay() -> None:
    """ELECTRA's exponents for 2 layers: embeddings 4, layers 3 and 2, pooler 1, head 0."""
    model = fastbert.BertForSequenceClassification(CONFIG)
    exponents = {"embeddings": 4, "layer.0.": 3, "layer.1.": 2, "pooler": 1, "classifier": 0}
    for name, (_, scale) in by_name(model, param_groups(model, 0.01, 0.5)).items():
        (exponent,) = [e for part, e in exponents.items() if part in name]
        assert scale == 0.5**exponent, name


def test_the_optimiser_scales_its_learning_rate() -> None:
    model = fastbert.BertForSequenceClassification(CONFIG)
    optimizer = AdamW(param_groups(model, 0.01, 0.5), lr=0.8)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {1.0: 0.8, 0.5: 0.4, 0.25: 0.2, 0.125: 0.1, 0.0625: 0.05}


def test_what_is_frozen_or_shared() -> None:
    model = fastbert.BertForMaskedLM(CONFIG)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    names = by_name(model, param_groups(model, 0.01))
    assert "bert.embeddings.position_embeddings.weight" not in names
    assert "bert.embeddings.word_embeddings.weight" in names  # and once, not as the decoder's too


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert len(param_groups(model, 0.01)) == 2
    with pytest.raises(ValueError, match="^layer_decay: got 0.9, but Sequential has no numbered"):
        param_groups(model, 0.01, 0.9)
    with pytest.raises(ValueError, match="^layer_decay: got 1.5, expected"):
        param_groups(model, 0.01, 1.5)
