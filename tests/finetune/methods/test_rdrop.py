"""R-Drop against its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.finetune.methods import RDrop

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

ALPHA = 0.7


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
def test_loss_is_the_equation(kind: str) -> None:
    task = "SequenceClassification"
    model = (native if kind == "packed" else hugging_face)(task, dropout=0.3)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    inputs = packed(task) if kind == "packed" else padded(task)
    torch.manual_seed(6)
    one, two = model(**inputs), model(**inputs)
    p, q = one.logits.log_softmax(1), two.logits.log_softmax(1)
    kl = [F.kl_div(b, a, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p))]
    expected = (one.loss + two.loss) / 2 + ALPHA * (kl[0] + kl[1]) / 2
    assert float(kl[0].detach()) > 0
    expected.backward()
    theirs = gradients(model)
    torch.manual_seed(6)
    output = RDrop(ALPHA).loss(forward_of(model), inputs, model)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert_same(gradients(model), theirs)


@pytest.mark.parametrize("task", TASKS)
def test_without_dropout_it_is_plain_training(task: str) -> None:
    model, inputs = native(task), packed(task)
    method = RDrop()
    method.prepare(model)
    plain = model(**inputs).loss
    torch.testing.assert_close(method.loss(forward_of(model), inputs, model).loss, plain)


def test_packed_equals_padded() -> None:
    """Of one model with the same dropout in both forms: padding is no answer."""
    for task in TASKS:
        model = native(task, dropout=0.3)
        losses = []
        for inputs in (packed(task), padded(task)):
            torch.manual_seed(1)
            losses.append(RDrop(5.0).loss(forward_of(model), inputs, model).loss)
        torch.testing.assert_close(losses[0], losses[1])
