"""Label smoothing and class weights against torch's cross entropy and by hand."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastbert.finetune.methods import ClassWeights, LabelSmoothing
from fastbert.finetune.methods.smoothing import balanced
from fastbert.models.outputs import TaskOutput

from ._models import CLASSES, LENGTHS, forward_of, hugging_face, native, packed, padded

EPSILON = 0.3
WEIGHTS = (1.0, 2.5, 0.5)


def loss(method: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    method.prepare(model)
    return method.loss(forward_of(model), inputs, model).loss.detach()


@pytest.mark.parametrize(
    "task", ["SequenceClassification", "TokenClassification", "MultipleChoice"]
)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_smoothing_is_torchs(task: str, kind: str) -> None:
    model, inputs = (
        (native(task), packed(task)) if kind == "packed" else (hugging_face(task), padded(task))
    )
    logits = model(**inputs).logits
    labels = inputs["labels"].flatten()
    rows = logits.view(len(labels), -1)
    expected = F.cross_entropy(rows, labels, label_smoothing=EPSILON).detach()
    torch.testing.assert_close(loss(LabelSmoothing(EPSILON), model, inputs), expected)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_smoothing_of_spans_stays_in_the_text(kind: str) -> None:
    task = "QuestionAnswering"
    lengths = LENGTHS if kind == "packed" else (4, 4)  # Hugging Face's own loss counts padding
    inputs = packed(task, lengths=lengths) if kind == "packed" else padded(task, lengths=lengths)
    model = native(task) if kind == "packed" else hugging_face(task)
    output = model(**inputs)
    terms = []
    for end in ("start", "end"):
        logits, start = getattr(output, f"{end}_logits").detach().flatten(), 0
        rows = []
        for n, position in zip(lengths, inputs[f"{end}_positions"], strict=True):
            row = logits[start : start + n][None]
            rows.append(F.cross_entropy(row, position[None], label_smoothing=EPSILON))
            start += n
        terms.append(torch.stack(rows).mean())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss(LabelSmoothing(EPSILON), model, inputs), expected)


def test_smoothing_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), the first is right: .7 log 2 + .3 (log 2 + 2 log 4) / 3; a row without a
    label does not count."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], dtype=torch.float64).log()
    output = TaskOutput(torch.tensor(log(2.0), dtype=torch.float64), logits)
    inputs = {"labels": torch.tensor([0, -100])}
    model = native("TokenClassification")
    smoothed = LabelSmoothing(0.3).loss(lambda _: output, inputs, model).loss
    assert float(smoothed) == pytest.approx(0.7 * log(2) + 0.3 * (log(2) + 2 * log(4)) / 3)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_weights_are_torchs(task: str, kind: str) -> None:
    model, inputs = (
        (native(task), packed(task)) if kind == "packed" else (hugging_face(task), padded(task))
    )
    rows = model(**inputs).logits.detach().view(-1, CLASSES)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(rows, inputs["labels"].flatten(), weight)
    torch.testing.assert_close(loss(ClassWeights(WEIGHTS), model, inputs), expected)


def test_balanced_weights_by_hand() -> None:
    """Of 12 examples 6, 4 and 2: 12 / (3 n) = 2/3, 1 and 2."""
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    method = ClassWeights()
    method.count_classes([6, 4, 2])
    assert balanced([6, 4, 2]) == pytest.approx((2 / 3, 1.0, 2.0))
    by_hand = ClassWeights((2 / 3, 1.0, 2.0))
    torch.testing.assert_close(loss(method, model, inputs), loss(by_hand, model, inputs))
    method.count_classes([6, 6, 0])
    torch.testing.assert_close(
        loss(method, model, {**inputs, "labels": torch.tensor([0, 1, 1, 0])}),
        model(**{**inputs, "labels": torch.tensor([0, 1, 1, 0])}).loss.detach(),
    )


def test_weighted_and_smoothed() -> None:
    """The weighted loss is smoothed: (1 - epsilon) weighted + epsilon uniform, unweighted."""
    model, inputs = native("SequenceClassification"), packed("SequenceClassification")
    logits = model(**inputs).logits.detach()
    weighted = loss(ClassWeights(WEIGHTS), model, inputs)
    uniform = -logits.log_softmax(1).mean()
    both = loss(ClassWeights(WEIGHTS) + LabelSmoothing(EPSILON), model, inputs)
    torch.testing.assert_close(both, (1 - EPSILON) * weighted + EPSILON * uniform)


@pytest.mark.parametrize("kind", [LabelSmoothing(), ClassWeights(WEIGHTS)])
@pytest.mark.parametrize("task", ["regression", "several"])
def test_what_is_no_single_class_is_refused(kind: Any, task: str) -> None:
    with pytest.raises(ValueError, match="expected single classes"):
        kind.prepare(native(task))
    model, inputs = native("SequenceClassification"), packed("several")
    kind.prepare(model)  # whose labels turn out to be several at once
    with pytest.raises(ValueError, match=f"{kind.name}: got labels of several classes at once"):
        kind.loss(forward_of(model), inputs, model)


def test_bad_weights_are_named() -> None:
    model = native("SequenceClassification")
    for weights, text in (
        ("even", "class-weights: weights: got 'even', expected 'balanced' or numbers"),
        ((1.0, -1.0), "expected numbers >= 0"),
        ((0.0, 0.0), "expected numbers >= 0"),
        ((1.0, float("nan")), "expected numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=text):
            ClassWeights(weights)
    with pytest.raises(ValueError, match="weights: got 2, expected one for each of 3 classes"):
        ClassWeights((1.0, 2.0)).prepare(model)
    with pytest.raises(ValueError, match="balanced, but nobody has said how frequent classes are"):
        ClassWeights().prepare(model)
    with pytest.raises(ValueError, match="class-weights: got a BertForMultipleChoice"):
        ClassWeights((1.0,)).prepare(native("MultipleChoice"))
