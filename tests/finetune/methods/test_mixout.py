"""Mixout against its equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastbert
from fastbert.finetune.methods import SMART, Mixout

from ._models import (
    TASKS,
    assert_same,
    forward_of,
    gradients,
    hugging_face,
    native,
    packed,
    padded,
)

P = 0.6
Tensor = torch.Tensor


def mixed_names(parameters: dict[str, Tensor]) -> list[str]:
    """The weights of the layers' Linears: not those of the head, the pooler and the tables."""
    return [name for name, p in parameters.items() if ".layer." in name and p.dim() == 2]


def trained(task: str, make: Any, **changes: Any) -> tuple[Any, Mixout, dict[str, Tensor]]:
    """A model that has moved away from where it was prepared, and that place."""
    model, method = make(task, **changes), Mixout(P)
    method.prepare(model)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, method, initial


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
@pytest.mark.parametrize("task", TASKS)
def test_output_and_gradient_are_the_equations(task: str, kind: str) -> None:
    model, method, initial = trained(task, native if kind == "packed" else hugging_face)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    inputs = packed(task) if kind == "packed" else padded(task)
    masks = {}

    def forward(inputs: dict[str, Any]) -> Any:
        for name in mixed_names(initial):
            path, _, last = name.rpartition(".")
            w = getattr(model.get_submodule(path), last).detach()
            masks[name] = (~torch.isclose(w, initial[name])).double()
        return model(**inputs)

    output = method.loss(forward, inputs, model)
    output.loss.backward()
    ours = gradients(model)

    mixed = {}
    for name, m in masks.items():
        w, w0 = model.get_parameter(name).detach(), initial[name]
        mixed[name] = ((m * w + (1 - m) * w0 - P * w0) / (1 - P)).requires_grad_()
    expected = functional_call(model, mixed, (), inputs).loss
    expected.backward()
    theirs = gradients(model)
    for name, m in masks.items():
        theirs[name] = m * mixed[name].grad / (1 - P)
    torch.testing.assert_close(output.loss, expected)
    assert_same(ours, theirs)
    assert float(torch.cat([m.flatten() for m in masks.values()]).mean()) == pytest.approx(
        1 - P, abs=0.02
    )


def test_expectation_is_the_weight() -> None:
    """The mean of n draws of W' is W, its variance (W - W_0)^2 p / (1 - p)."""
    model, method, initial = trained("SequenceClassification", native)
    name, n, draws = mixed_names(initial)[0], 2000, []

    def forward(inputs: dict[str, Any]) -> Any:
        draws.append(model.bert.encoder.layer[0].attention.self.query.weight.detach().clone())

    torch.manual_seed(0)
    for _ in range(n):
        method.loss(forward, {}, model)
    w, w0 = model.get_parameter(name).detach(), initial[name]
    deviation = (w - w0).abs() * (P / (1 - P)) ** 0.5
    z = (torch.stack(draws).mean(0) - w) / (deviation / n**0.5)
    assert float(z.abs().max()) < 5.0
    assert 0.9 < float(z.std()) < 1.1
    kept = torch.isclose(torch.stack(draws), w0).double().mean()
    assert float(kept) == pytest.approx(P, abs=0.01)


def test_eval_is_plain() -> None:
    model, method, _ = trained("SequenceClassification", native)
    inputs = packed("SequenceClassification")
    model.eval()
    assert torch.equal(method.loss(forward_of(model), inputs, model).logits, model(**inputs).logits)


def test_modules_are_plain_before_inside_and_after() -> None:
    model, method, _ = trained("SequenceClassification", native)
    query = model.bert.encoder.layer[0].attention.self.query
    parameter = query.weight

    def forward(inputs: dict[str, Any]) -> Any:
        assert type(query) is nn.Linear and query.weight is not parameter
        return model(**inputs)

    method.loss(forward, packed("SequenceClassification"), model).loss.backward()
    assert query.weight is parameter and parameter.grad is not None


def test_before_the_first_update_nothing_changes() -> None:
    model, inputs = native("TokenClassification"), packed("TokenClassification")
    method = Mixout(P)
    method.prepare(model)
    ours = method.loss(forward_of(model), inputs, model).loss
    torch.testing.assert_close(ours, model(**inputs).loss)


def test_inside_smart_all_passes_mix_the_same() -> None:
    """At the start the average is the model: the proximal term is 0 whatever Mixout draws."""
    model, _, _ = trained("SequenceClassification", native)
    method = Mixout(P) + SMART(weight=0.0)
    method.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    inputs, seen = packed("SequenceClassification"), []

    def forward(inputs: dict[str, Any]) -> Any:
        output = model(**inputs)
        seen.append(output.logits.detach())
        return output

    method.loss(forward, inputs, model)
    assert len(seen) == 2 and torch.equal(*seen)


def test_state_is_the_pretrained_weight() -> None:
    model, method, initial = trained("SequenceClassification", native)
    state = method.state()
    assert_same(state, {name: initial[name] for name in mixed_names(initial)})
    other = Mixout(P)
    other.prepare(model)
    other.load_state(state)
    inputs = packed("SequenceClassification")
    losses = []
    for one in (method, other):
        torch.manual_seed(0)
        losses.append(one.loss(forward_of(model), inputs, model).loss)
    assert torch.equal(*losses)


def test_training_without_preparation_is_refused() -> None:
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    with pytest.raises(ValueError, match="mixout: expected prepare\\(model\\) before training"):
        Mixout().loss(forward_of(model), inputs, model)


def test_gradient_checkpointing_is_refused() -> None:
    model = native("SequenceClassification")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="mixout: gradient checkpointing is on, expected it off"):
        Mixout().prepare(model)
