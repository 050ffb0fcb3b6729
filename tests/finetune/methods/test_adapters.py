"""Adapters: what is trained, where they stand, and the way into a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.finetune.methods import Adapters, parse
from fastbert.finetune.methods.structure import NOTE

from ._models import HIDDEN, LAYERS, TASKS, forward_of, hugging_face, native, packed, padded

SIZE = 5
PLACES = ("attention.output.dense", "output.dense")


def adapted(task: str, make: Any, std: float = 1e-3, **changes: Any) -> Any:
    model = make(task, **changes)
    Adapters(SIZE, std).prepare(model)
    return model


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
@pytest.mark.parametrize("task", TASKS)
def test_nearly_the_identity_at_first(task: str, kind: str) -> None:
    model = (native if kind == "packed" else hugging_face)(task)
    inputs = packed(task) if kind == "packed" else padded(task)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    before = model(**inputs).loss.detach()
    Adapters(SIZE).prepare(model)
    after = model(**inputs).loss.detach()
    assert 0.0 < float((after - before).abs()) < 1e-3


@pytest.mark.parametrize("make", [native, hugging_face])
@pytest.mark.parametrize("task", ["SequenceClassification", "QuestionAnswering"])
def test_adapters_norms_and_head_alone_are_trained(task: str, make: Any) -> None:
    model = adapted(task, make)
    inputs = packed(task) if make is native else padded(task)
    model(**inputs).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    head = ("classifier", "qa_outputs", "bert.pooler")
    for name, _ in model.named_parameters():
        expected = ".down." in name or ".up." in name or "LayerNorm" in name
        assert (name in trained) == (expected or name.startswith(head)), name
    sizes = [
        p.numel() for name, p in model.named_parameters() if ".down." in name or ".up." in name
    ]
    assert sum(sizes) == LAYERS * 2 * (2 * HIDDEN * SIZE + SIZE + HIDDEN)


def test_the_equation() -> None:
    """Against a layer of plain torch ops, written down from the paper's figure."""
    model = adapted("TokenClassification", native, std=0.5).eval()
    layer = model.bert.encoder.layer[0]
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    for path in PLACES:
        module = layer.get_submodule(path)
        y = x if path.startswith("attention") else torch.randn(6, 40, dtype=torch.float64)
        projected = y @ module.weight.T + module.bias
        bottleneck = F.gelu(projected @ module.down.weight.T + module.down.bias)
        expected = projected + bottleneck @ module.up.weight.T + module.up.bias
        torch.testing.assert_close(module(y), expected)


@pytest.mark.parametrize("kind", ["packed", "accelerated"])
def test_the_fused_layer_computes_with_them(kind: str) -> None:
    """As Hugging Face's own layer does, gradients too."""
    task, lengths = "TokenClassification", (4, 4)
    theirs = adapted(task, hugging_face, std=0.5)
    if kind == "packed":
        model, inputs = adapted(task, native, std=0.5), packed(task, lengths=lengths)
        model.load_state_dict(theirs.state_dict())
    else:
        model, inputs = adapted(task, hugging_face, std=0.5), padded(task, lengths=lengths)
        model.load_state_dict(theirs.state_dict())
        fastbert.accelerate(model)
    ours, expected = model(**inputs), theirs(**padded(task, lengths=lengths))
    torch.testing.assert_close(ours.loss, expected.loss)
    ours.loss.backward()
    expected.loss.backward()
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_to_a_folder_and_back(tmp_path: Path) -> None:
    model, inputs = (
        adapted("SequenceClassification", native, std=0.5),
        packed("SequenceClassification"),
    )
    method = Adapters(SIZE, 0.5)
    assert model.config.extra[NOTE] == ["adapters:size=5,std=0.5"]
    expected = model.eval()(**inputs).logits
    method.finish(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected: bert.encoder.layer.0.attention.output.dense"):
        fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    config = fastbert.BertConfig.from_json(tmp_path / "config.json")
    again = fastbert.BertForSequenceClassification(config).double().eval()
    method = parse("+".join(config.extra[NOTE]))
    method.prepare(again)
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(**inputs).logits, expected)
    assert again.config.extra[NOTE] == ["adapters:size=5,std=0.5"]  # noted once


def test_finish_thaws() -> None:
    model, method = native("SequenceClassification"), Adapters(SIZE)
    model.bert.embeddings.requires_grad_(False)  # by somebody else: stays so
    method.prepare(model)
    method.loss(forward_of(model), packed("SequenceClassification"), model).loss.backward()
    method.finish(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("bert.embeddings")}


def test_what_does_not_fit_is_named() -> None:
    model = adapted("SequenceClassification", native)
    with pytest.raises(ValueError, match="adapters: got a BertLayer, expected one with plain"):
        Adapters().prepare(model)
    with pytest.raises(ValueError, match="adapters: size: got 0, expected an int >= 1"):
        Adapters(0)
