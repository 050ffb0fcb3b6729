"""SMART's three terms against their equations, computed apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.finetune.methods import SMART
from fastbert.finetune.methods.inputs import Words
from fastbert.finetune.methods.predictions import divergence, predictions

from ._models import (
    HIDDEN,
    LENGTHS,
    TASKS,
    assert_same,
    forward_of,
    gradients,
    hugging_face,
    native,
    packed,
    padded,
)

Tensor = torch.Tensor
WEIGHT, MU, STEPS, ETA, EPSILON, NOISE = 3.0, 0.7, 2, 0.4, 0.5, 0.05


def method(**changes: Any) -> SMART:
    options = {"weight": WEIGHT, "proximal": MU, "steps": STEPS, "step_size": ETA,
               "epsilon": EPSILON, "noise": NOISE}  # fmt: skip
    return SMART(**{**options, **changes})


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """Of logits (rows, C), by torch's own KL."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    both = F.kl_div(log_q, log_p, log_target=True, reduction="none")
    both = both + F.kl_div(log_p, log_q, log_target=True, reduction="none")
    return both.sum(-1)


def distance(task: str, a: Any, b: Any, inputs: dict[str, Any]) -> Tensor:
    """D of padded outputs, written for each task by itself."""
    if task == "regression":
        return ((a.logits - b.logits) ** 2).mean()
    if task == "several":
        yes_no = [torch.stack([x.logits, torch.zeros_like(x.logits)], -1) for x in (a, b)]
        return symmetric_kl(*yes_no).mean()
    if task == "TokenClassification":
        return symmetric_kl(a.logits, b.logits)[inputs["labels"] != -100].mean()
    if task == "QuestionAnswering":
        rows = [
            symmetric_kl(getattr(a, end)[row, :n], getattr(b, end)[row, :n])
            for end in ("start_logits", "end_logits")
            for row, n in enumerate(LENGTHS)
        ]
        return torch.stack(rows).mean()
    return symmetric_kl(a.logits, b.logits).mean()


def naive(model: Any, average: Any, task: str, noise: Tensor, seed: int) -> Tensor:
    inputs = padded(task)
    ids = inputs["input_ids"]
    others = {name: x for name, x in inputs.items() if name != "input_ids"}

    def run(which: Any, delta: Tensor) -> Any:
        torch.manual_seed(seed)
        words = which.bert.embeddings.word_embeddings(ids)
        return which(**others, inputs_embeds=words + delta.view(words.shape))

    clean = run(model, torch.zeros_like(noise))
    delta = NOISE * noise
    for _ in range(STEPS):
        delta.requires_grad_()
        apart = distance(task, clean, run(model, delta), inputs)
        (g,) = torch.autograd.grad(apart, delta, retain_graph=True)
        new = delta.detach().clone()
        for row, column in (g != 0).any(-1).nonzero().tolist():
            token = g[row, column]
            new[row, column] += ETA * token / token.abs().max()
        delta = new.clamp(-EPSILON, EPSILON)
    smooth = distance(task, clean, run(model, delta), inputs)
    with torch.no_grad():
        earlier = run(average, torch.zeros_like(noise))
    return clean.loss + WEIGHT * smooth + MU * distance(task, clean, earlier, inputs)


def shifted(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
@pytest.mark.parametrize("task", TASKS)
def test_loss_is_the_equation(task: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = (native if kind == "packed" else hugging_face)(task, dropout=0.2)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    average = shifted(model)
    g = torch.Generator().manual_seed(2)
    noise = torch.randn(len(LENGTHS), max(LENGTHS), HIDDEN, dtype=torch.float64, generator=g)
    noise *= (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])[..., None]
    expected = naive(model, average, task, noise, seed=4)
    expected.backward()
    theirs = gradients(model)

    inputs = packed(task) if kind == "packed" else padded(task)
    if kind == "packed":
        monkeypatch.setattr(Words, "normal", lambda words: inputs["batch"].pack(noise))
    else:
        monkeypatch.setattr(Words, "normal", lambda words: noise.view(words.shape))
    ours = method()
    ours.prepare(model)
    ours.load_state(dict(average.named_parameters()))
    torch.manual_seed(4)
    output = ours.gradients(forward_of(model), inputs, lambda loss: loss.backward(), model)
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert_same(gradients(model), theirs, atol=1e-9)


def test_one_step_moves_each_token_by_its_largest_element() -> None:
    """By hand: g / |g|_inf is (.5, -1), times .1; the clip at .05 then leaves (.05, -.05)."""
    g = torch.tensor([[2.0, -4.0], [0.0, 0.0]])
    delta = torch.zeros(2, 2)
    free = method(step_size=0.1, epsilon=1.0)._step(delta, g)
    torch.testing.assert_close(free, torch.tensor([[0.05, -0.1], [0.0, 0.0]]))
    clipped = method(step_size=0.1, epsilon=0.05)._step(delta, g)
    torch.testing.assert_close(clipped, torch.tensor([[0.05, -0.05], [0.0, 0.0]]))


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(p, q) + KL(q, p) = 1/4 log 3."""
    model, inputs = (
        native("SequenceClassification", num_labels=2),
        {"labels": torch.zeros(1).long()},
    )

    def logits(p: list[float]) -> Any:
        output = fastbert.models.outputs.TaskOutput(loss=torch.zeros(()))
        output.logits = torch.tensor([p], dtype=torch.float64).log()
        return predictions(SMART(), output, inputs, model)

    p, q = logits([0.5, 0.5]), logits([0.75, 0.25])
    assert float(divergence(p, q)) == pytest.approx(0.25 * torch.tensor(3.0).log().item())
    assert float(divergence(p, p)) == 0.0


def test_average_moves_faster_in_the_first_tenth() -> None:
    model = native("SequenceClassification")
    ours = method(early_beta=0.5, beta=0.75)
    ours.prepare(model)
    name = "classifier.weight"
    start = model.classifier.weight.detach().clone()
    ours.after_step(model, 1, 20)  # before any loss: the average starts at the model
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    ours.after_step(model, 2, 20)
    torch.testing.assert_close(ours.state()[name], start + 0.5)
    ours.after_step(model, 3, 20)
    torch.testing.assert_close(ours.state()[name], start + 0.5 + 0.5 * 0.25)


def test_no_term_no_pass() -> None:
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    calls = []

    def forward(inputs: dict[str, Any]) -> Any:
        calls.append(1)
        return model(**inputs)

    plain = method(weight=0.0, proximal=0.0)
    plain.prepare(model)
    output = plain.loss(forward, inputs, model)
    plain.after_step(model, 1, 10)
    assert len(calls) == 1 and not plain.state()
    assert float(output.loss.detach()) == float(model(**inputs).loss.detach())


def test_at_the_start_the_proximal_term_is_nothing() -> None:
    """The average is the model, and both passes drop the same."""
    model, inputs = native("SequenceClassification", dropout=0.3), packed("SequenceClassification")
    ours = method(weight=0.0)
    ours.prepare(model)
    torch.manual_seed(0)
    Words.of(inputs, model).normal()
    expected = model(**inputs).loss
    torch.manual_seed(0)
    assert torch.equal(ours.loss(forward_of(model), inputs, model).loss, expected)


def test_models_without_a_task_are_refused() -> None:
    with pytest.raises(ValueError, match="smart: got a BertForMaskedLM, expected a model for one"):
        SMART().prepare(native("MaskedLM"))
