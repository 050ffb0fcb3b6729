"""FreeLB against a naive implementation of its algorithm, one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastbert
from fastbert.device import cuda_reason
from fastbert.finetune.methods import FreeLB
from fastbert.finetune.methods.inputs import Words
from fastbert.ops import BACKENDS

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
    same_weights,
)

Tensor = torch.Tensor
K, ALPHA, MAGNITUDE, EPSILON = 3, 0.3, 0.5, 0.4


def method(**changes: Any) -> FreeLB:
    options = {"steps": K, "step_size": ALPHA, "magnitude": MAGNITUDE, "epsilon": EPSILON}
    return FreeLB(**{**options, **changes})


def padded_noise(seed: int, rows: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.empty(rows, max(LENGTHS), HIDDEN, dtype=torch.float64).uniform_(-1, 1)


def naive(model: Any, task: str, noise: Tensor, seed: int) -> tuple[float, list[Tensor]]:
    """Algorithm 1 of arXiv 1909.11764 on padded inputs with loops over sequences: the mean of the
    K losses, whose gradients are left in the parameters, and every delta."""
    inputs = padded(task)
    ids = inputs.pop("input_ids")
    flat_mask = inputs["attention_mask"].view(-1, ids.shape[-1])
    delta = torch.zeros_like(noise)
    for row, n in enumerate(flat_mask.sum(1).tolist()):
        delta[row, :n] = noise[row, :n] * MAGNITUDE / (n * HIDDEN) ** 0.5
    total, deltas = 0.0, []
    for _ in range(K):
        deltas.append(delta)
        delta = delta.clone().requires_grad_()
        words = model.bert.embeddings.word_embeddings(ids)
        torch.manual_seed(seed)  # the dropout of every pass
        loss = model(**inputs, inputs_embeds=words + delta.view(words.shape)).loss
        (loss / K).backward()
        total += float(loss.detach()) / K
        new = []
        for row in range(len(delta)):
            g = delta.grad[row]
            moved = delta[row].detach()
            if g.any():  # no token of a sequence may be labelled
                moved = moved + ALPHA * g / g.norm()
            new.append(moved * EPSILON / moved.norm() if moved.norm() > EPSILON else moved)
        delta = torch.stack(new)
    return total, deltas


@pytest.mark.parametrize("task", TASKS)
def test_packed_follows_the_algorithm(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = native(task, dropout=0.2), packed(task)
    noise = padded_noise(3, len(LENGTHS))
    expected, deltas = naive(model, task, noise, seed=7)
    theirs = gradients(model)
    monkeypatch.setattr(Words, "uniform", lambda words: inputs["batch"].pack(noise))
    seen = []
    perturbed = Words.perturbed

    def watch(words: Words, delta: Tensor) -> Any:
        seen.append(delta.detach().clone())
        return perturbed(words, delta)

    monkeypatch.setattr(Words, "perturbed", watch)
    torch.manual_seed(7)
    output = method().gradients(forward_of(model), inputs, lambda loss: loss.backward(), model)
    assert float(output.loss) == pytest.approx(expected, rel=1e-12)
    assert_same(gradients(model), theirs)
    for ours, delta in zip(seen, deltas, strict=True):
        torch.testing.assert_close(ours, inputs["batch"].pack(delta))
    assert any(float(d[0].norm()) == pytest.approx(EPSILON) for d in deltas[1:])  # projected


@pytest.mark.parametrize("kind", ["plain", "accelerated"])
@pytest.mark.parametrize("task", TASKS)
def test_hugging_face_follows_the_algorithm(
    task: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hugging_face(task, dropout=0.2)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    noise = padded_noise(3, len(LENGTHS))
    expected, _ = naive(model, task, noise, seed=7)
    theirs = gradients(model)
    monkeypatch.setattr(Words, "uniform", lambda words: words._kept(noise.view(words.shape)))
    torch.manual_seed(7)
    output = method().gradients(
        forward_of(model), padded(task), lambda loss: loss.backward(), model
    )
    assert float(output.loss) == pytest.approx(expected, rel=1e-12)
    assert_same(gradients(model), theirs)


def test_loss_has_the_gradients_of_gradients() -> None:
    model, inputs = native("SequenceClassification", dropout=0.1), packed("SequenceClassification")
    torch.manual_seed(5)
    one = method().gradients(forward_of(model), inputs, lambda loss: loss.backward(), model)
    theirs = gradients(model)
    torch.manual_seed(5)
    other = method().loss(forward_of(model), inputs, model)
    other.loss.backward()
    assert_same(gradients(model), theirs)
    assert torch.equal(one.loss, other.loss.detach())


def test_generators_end_as_after_one_pass() -> None:
    model, inputs = native("SequenceClassification", dropout=0.1), packed("SequenceClassification")
    torch.manual_seed(5)
    Words.of(inputs, model).uniform()
    model(**inputs)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    method().loss(forward_of(model), inputs, model)
    assert torch.equal(torch.get_rng_state(), expected)


def test_one_step_without_noise_is_plain_training() -> None:
    model, inputs = native("TokenClassification"), packed("TokenClassification")
    model(**inputs).loss.backward()
    theirs = gradients(model)
    plain = method(steps=1, magnitude=0.0)
    plain.gradients(forward_of(model), inputs, lambda loss: loss.backward(), model)
    assert_same(gradients(model), theirs)


def test_noise_is_of_its_size_and_never_on_padding() -> None:
    inputs = padded("SequenceClassification")
    words = Words.of(inputs, hugging_face("SequenceClassification"))
    noise = words.uniform()
    assert float(noise.abs().max()) <= 1.0 < 1.02 * float(noise.abs().max())
    assert not noise[inputs["attention_mask"] == 0].any()
    assert words.lengths.flatten().tolist() == list(LENGTHS)


def test_gradient_of_embeddings_is_that_of_finite_differences() -> None:
    """In a random direction; and the parameters' is as if ids had been given."""
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    words = Words.of(inputs, model)
    delta = torch.zeros(words.shape, dtype=torch.float64, requires_grad=True)
    step = torch.randn(words.shape, dtype=torch.float64)
    model(**words.perturbed(delta)).loss.backward()
    from_embeddings = gradients(model)
    with torch.no_grad():
        up, down = (model(**words.perturbed(sign * 1e-5 * step)).loss for sign in (1.0, -1.0))
    model(**inputs).loss.backward()
    assert delta.grad is not None
    assert float((delta.grad * step).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)
    assert_same(from_embeddings, gradients(model))


def embedding_gradients(backend: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = native("SequenceClassification").to(device, dtype)
    inputs = packed("SequenceClassification")
    inputs = {"batch": inputs["batch"].to(device), "labels": inputs["labels"].to(device)}
    words = Words.of(inputs, model)
    delta = torch.zeros(words.shape, dtype=dtype, device=device, requires_grad=True)
    with fastbert.use_backend(backend):
        model(**words.perturbed(delta)).loss.backward()
    assert delta.grad is not None
    return {name: g.double().cpu() for name, g in {"delta": delta.grad, **gradients(model)}.items()}


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(backend, device, marks=[pytest.mark.gpu] * (device == "cuda"))
        for backend in BACKENDS
        for device in ("cpu", "cuda")[: 2 if cuda_reason() is None else 1]
        if BACKENDS[backend].reason(device) is None
    ],
)
def test_gradient_of_embeddings_is_right_on_every_backend(backend: str, device: str) -> None:
    exact = embedding_gradients("reference", "cpu", torch.float64)
    theirs = embedding_gradients("reference", device, torch.float32)
    ours = embedding_gradients(backend, device, torch.float32)
    for name, expected in exact.items():
        error, allowed = (float((g[name] - expected).abs().max()) for g in (ours, theirs))
        assert error <= 2 * allowed + 1e-6, name


def test_roberta_keeps_the_positions_of_its_tokens() -> None:
    from ...hf._models import batch_for, lengths_mask, tiny

    name = "RobertaForSequenceClassification"
    model, inputs = tiny(name), batch_for(name, lengths_mask(side="left"))
    words = Words.of(inputs, model)
    same = model(**words.perturbed(torch.zeros(words.shape))).logits
    torch.testing.assert_close(same, model(**inputs).logits)


def test_bad_options_are_named() -> None:
    for options, text in (
        ({"steps": 0}, "steps: got 0, expected an int >= 1"),
        ({"steps": 2.5}, "steps: got 2.5, expected an int >= 1"),
        ({"epsilon": 0.0}, "epsilon: got 0.0, expected a number > 0"),
        ({"magnitude": -1.0}, "magnitude: got -1.0, expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=text):
            FreeLB(**options)


def test_no_loss_no_freelb() -> None:
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    del inputs["labels"]
    with pytest.raises(ValueError, match="freelb: got an output without a loss, expected labels"):
        method().loss(forward_of(model), inputs, model)


def test_native_and_hugging_face_agree() -> None:
    theirs = hugging_face("QuestionAnswering")
    ours = same_weights(native("QuestionAnswering"), theirs)
    inputs = padded("QuestionAnswering", lengths=(4, 4))  # HF's loss counts padding
    plain = method(magnitude=0.0)
    plain.gradients(forward_of(theirs), inputs, lambda loss: loss.backward(), theirs)
    inputs = packed("QuestionAnswering", lengths=(4, 4))
    plain.gradients(forward_of(ours), inputs, lambda loss: loss.backward(), ours)
    assert_same(gradients(ours), gradients(theirs))
