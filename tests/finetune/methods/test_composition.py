"""What text, plus signs and orders make of methods; and what does not go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.finetune.methods import (
    METHODS,
    SMART,
    Adapters,
    ClassWeights,
    ClsNorm,
    FreeLB,
    LabelSmoothing,
    LayerwiseLR,
    LoRA,
    Method,
    Methods,
    Mixout,
    RDrop,
    Reinit,
    ScalarMix,
    parse,
    register,
)

from ._models import TASKS, assert_same, forward_of, gradients, hugging_face, native, packed, padded


def backward(loss: torch.Tensor) -> None:
    loss.backward()


def test_text_to_method_and_back() -> None:
    text = "freelb:steps=3,epsilon=.6+layerwise-lr:.9+class-weights:1/2.5/3+reinit:2,pooler=false"
    method = parse(text)
    assert method == Methods(
        (
            FreeLB(steps=3, epsilon=0.6),
            LayerwiseLR(0.9),
            ClassWeights((1.0, 2.5, 3.0)),
            Reinit(2, pooler=False),
        )
    )
    assert parse(str(method)) == method
    assert str(parse("mixout:0.9+freelb")) == "mixout:p=0.9+freelb"
    assert parse("freelb:epsilon=1e+3+mixout") == FreeLB(epsilon=1e3) + Mixout()
    assert parse(str(Mixout(0.123456789))) == Methods((Mixout(0.123456789),))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    kind = METHODS[name]
    assert kind.name == name and kind.paper and kind.summary and kind.__doc__
    assert parse(str(kind())) == Methods((kind(),))


def test_plain_is_no_method_at_all() -> None:
    model, inputs = native("TokenClassification"), packed("TokenClassification")
    model(**inputs).loss.backward()
    expected = gradients(model)
    assert parse("plain") == Methods() and str(Methods()) == "plain"
    Methods().gradients(forward_of(model), inputs, backward, model)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("freeelb", "method: got 'freeelb', expected some of plain, scalar-mix, "),
        ("freelb:step=3", "method freelb: got 'step=3', expected option=value with some of steps"),
        ("freelb:steps=3,steps=4", "each at most once"),
        ("freelb:steps=", "got 'steps=', expected option=value"),
        ("freelb:", "got '', expected option=value"),
        ("freelb:steps=three", "freelb: steps: got 'three', expected an int >= 1"),
        ("mixout:1", "mixout: p: got 1, expected p < 1"),
        ("reinit:1,pooler=no", "reinit: pooler: got 'no'"),
        ("gated-layers:wide", "gated-layers: bias: got 'wide', expected a number"),
        ("class-weights:3", "class-weights: weights: got 3, expected numbers >= 0"),
        ("lora:targets=3", "lora: targets: got 3, expected names of Linears"),
        ("mixout+mixout:.8", "method: mixout\\+mixout has one twice"),
        ("freelb+smart", "method: smart and freelb do not go together \\(adversarial\\)"),
        ("scalar-mix+gated-layers", "do not go together \\(layer aggregation\\)"),
        ("adapters+mixout", "method: adapters and mixout do not go together"),
        ("lora+reinit", "method: lora and reinit do not go together"),
        ("lora+adapters", "method: adapters and lora do not go together \\(frozen encoder\\)"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_sums_are_checked_too() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        LayerwiseLR() + LoRA() + Adapters()
    with pytest.raises(TypeError):
        LayerwiseLR() + 1  # type: ignore[operator]


def test_registered_methods_are_parsed() -> None:
    @register
    @dataclass
    class Nothing(Method):
        name = "nothing"
        paper = "none"
        summary = "nothing at all"
        depth: int = 1

    try:
        assert parse("nothing:3") == Methods((Nothing(3),))
        with pytest.raises(ValueError, match="the name 'nothing' is taken"):
            register(Nothing)
    finally:
        del METHODS["nothing"]


def test_those_of_a_higher_order_are_outside() -> None:
    """FreeLB of K = 2 around label smoothing: both losses are smoothed, each at its own delta."""
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    epsilon, seen = 0.3, []

    def forward(inputs: dict[str, Any]) -> Any:
        output = model(**inputs)
        seen.append(output.logits.detach())
        return output

    method = LabelSmoothing(epsilon) + FreeLB(steps=2, step_size=0.5, epsilon=1.0)
    output = method.gradients(forward, inputs, backward, model)
    labels = inputs["labels"]
    by_torch = [F.cross_entropy(x, labels, label_smoothing=epsilon) for x in seen]
    assert len(seen) == 2 and not torch.equal(*seen)
    assert float(output.loss) == pytest.approx(float(sum(by_torch)) / 2)


def test_rates_multiply() -> None:
    model = native("SequenceClassification")

    @dataclass
    class Half(Method):
        name = "half"

        def rates(self, model: Any) -> dict[str, float]:
            return {name: 0.5 for name, _ in model.named_parameters()}

    rates = (LayerwiseLR(0.9) + Half()).rates(model)
    assert rates["classifier.weight"] == 0.5
    assert rates["bert.pooler.dense.weight"] == pytest.approx(0.45)


def test_the_learning_rate_is_that_of_the_method_that_has_one() -> None:
    assert Methods().learning_rate is None
    assert (LayerwiseLR() + FreeLB()).learning_rate is None
    assert (LayerwiseLR() + Adapters()).learning_rate == 3e-4


def test_state_of_each_comes_back() -> None:
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    method = SMART() + Mixout(0.5)
    method.prepare(model)
    method.gradients(forward_of(model), inputs, backward, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    method.after_step(model, 1, 10)
    state = method.state()
    assert {name.partition(".")[0] for name in state} == {"smart", "mixout"}
    other = SMART() + Mixout(0.5)
    other.prepare(model)
    other.load_state(state)
    assert_same(other.state(), state)


COMBINATIONS = (
    "layerwise-lr:.9+freelb+mixout:.7",
    "smart+mixout+scalar-mix",
    "adapters:4+layerwise-lr+r-drop+squeeze-excitation",
    "reinit:1+gated-layers+freelb+r-drop",
    "lora:2+smart",
)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("text", COMBINATIONS)
def test_combinations_train_every_task(text: str, task: str) -> None:
    """A few steps lower the loss of the model itself."""
    for model, inputs in ((native(task), packed(task)), (hugging_face(task), padded(task))):
        method = parse(text)
        method.prepare(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=2e-3)
        torch.manual_seed(0)
        before = float(model(**inputs).loss.detach())
        for step in range(1, 13):
            method.gradients(forward_of(model), inputs, backward, model)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(model, step, 12)
        with torch.no_grad():
            after = float(model(**inputs).loss)
            assert after < before
            model.eval()
            outside = model(**inputs).loss
            method.finish(model)
            torch.testing.assert_close(model(**inputs).loss, outside)
        assert all(p.requires_grad for p in model.parameters())


def test_methods_hold_nothing_of_an_earlier_model() -> None:
    """One object trains one model after another, as several seeds do."""
    method = Mixout(0.5) + SMART() + ScalarMix()
    inputs = packed("SequenceClassification")
    losses = []
    for _ in range(2):
        model = native("SequenceClassification")
        torch.manual_seed(1)
        method.prepare(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        losses.append(float(method.loss(forward_of(model), inputs, model).loss.detach()))
        method.finish(model)
    assert losses[0] == losses[1]


def test_r_drop_inside_freelb_keeps_two_dropouts() -> None:
    model, inputs = native("SequenceClassification", dropout=0.3), packed("SequenceClassification")
    seen = []

    def forward(inputs: dict[str, Any]) -> Any:
        output = model(**inputs)
        seen.append(output.logits.detach())
        return output

    method = RDrop() + FreeLB(steps=2, step_size=0.0, magnitude=0.0)
    method.gradients(forward, inputs, backward, model)
    one, other, again, other_again = seen
    assert not torch.equal(one, other)
    assert torch.equal(one, again) and torch.equal(other, other_again)


@pytest.mark.parametrize("kind", ["native", "accelerated"])
def test_running_statistics_are_of_the_trained_model(kind: str) -> None:
    """Cls-norm's averages are of no pass of SMART's average model."""
    task = "SequenceClassification"
    model = native(task) if kind == "native" else hugging_face(task)
    inputs = packed(task) if kind == "native" else padded(task)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    method = ClsNorm(momentum=0.25) + SMART(weight=0.0)
    method.prepare(model)
    method.after_step(model, 1, 10)  # the average is the model as it starts
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(-2.0)
    features = []
    norm = model.cls_norm
    norm.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    method.loss(forward_of(model), inputs, model).loss.backward()
    trained, average = features
    assert not torch.allclose(trained.mean(0), average.mean(0))
    torch.testing.assert_close(norm.running_mean, 0.25 * trained.mean(0))
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * trained.var(0))
