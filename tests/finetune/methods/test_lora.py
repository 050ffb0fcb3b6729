"""LoRA: what is trained, and that what is merged computes the same in plain Linears."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from fastbert.finetune.methods import LoRA

from ._models import HIDDEN, TASKS, hugging_face, native, packed, padded

RANK, ALPHA = 2, 3.0


def tuned(task: str, kind: str, **changes: Any) -> tuple[Any, LoRA, dict[str, Any]]:
    """A model with LoRAs that have left 0, in eval mode."""
    model = (native if kind == "packed" else hugging_face)(task)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    method = LoRA(RANK, ALPHA, **changes)
    method.prepare(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    return model.eval(), method, packed(task) if kind == "packed" else padded(task)


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
@pytest.mark.parametrize("task", TASKS)
def test_merged_is_unmerged(task: str, kind: str) -> None:
    model, method, inputs = tuned(task, kind)
    fresh = (native if kind == "packed" else hugging_face)(task)
    expected = model(**inputs).loss
    method.finish(model)
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert {type(m) for m in model.modules()} == {type(m) for m in fresh.modules()}
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_the_equation() -> None:
    """W' = W + alpha / rank B A, in the query and value of each layer, and in nothing else."""
    model, method, _ = tuned("SequenceClassification", "packed")
    plain = native("SequenceClassification")
    updates = {}
    for i, layer in enumerate(model.bert.encoder.layer):
        for name in ("query", "value"):
            wrapped = getattr(layer.attention.self, name)
            a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
            assert a.shape == (RANK, HIDDEN) and b.shape == (HIDDEN, RANK)
            key = f"bert.encoder.layer.{i}.attention.self.{name}.weight"
            updates[key] = (ALPHA / RANK * b @ a).detach().double()
    method.finish(model)
    for name, weight in plain.state_dict().items():
        expected = weight + updates.pop(name, 0.0)
        torch.testing.assert_close(model.state_dict()[name], expected)
    assert not updates


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
def test_nothing_changes_before_training(kind: str) -> None:
    model = (native if kind == "packed" else hugging_face)("SequenceClassification").eval()
    inputs = (packed if kind == "packed" else padded)("SequenceClassification")
    before = model(**inputs).logits
    LoRA(RANK).prepare(model)
    torch.testing.assert_close(model.eval()(**inputs).logits, before)


@pytest.mark.parametrize("make", [native, hugging_face])
def test_updates_and_head_alone_are_trained(make: Any) -> None:
    model = make("SequenceClassification")
    LoRA(RANK).prepare(model)
    inputs = (packed if make is native else padded)("SequenceClassification")
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        expected = "lora_" in name or name.startswith(("classifier", "bert.pooler"))
        assert parameter.requires_grad == (parameter.grad is not None) == expected, name


def test_other_targets() -> None:
    model, method, inputs = tuned("SequenceClassification", "packed", targets=("dense", "key"))
    wrapped = [name for name, m in model.named_modules() if hasattr(m, "base_layer")]
    assert {name.rpartition(".")[2] for name in wrapped} == {"dense", "key"}
    expected = model(**inputs).logits
    method.finish(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert not [m for m in model.modules() if hasattr(m, "base_layer")]
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="lora: targets: got keys, expected some of classifier, "):
        LoRA(targets=("query", "keys")).prepare(native("SequenceClassification"))
    with pytest.raises(ValueError, match="lora: rank: got 0, expected an int >= 1"):
        LoRA(0)


def test_without_peft_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        LoRA().prepare(native("SequenceClassification"))
