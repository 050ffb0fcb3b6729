"""[CLS] normalisation by hand, and merged into the classifier."""

from __future__ import annotations

import pytest
import torch

import fastbert
from fastbert.finetune.methods import ClsNorm

from ._models import hugging_face, native, packed, padded

MOMENTUM = 0.25


@pytest.mark.parametrize("kind", ["packed", "plain", "accelerated"])
@pytest.mark.parametrize("task", ["SequenceClassification", "regression", "MultipleChoice"])
def test_the_equation(task: str, kind: str) -> None:
    model = (native if kind == "packed" else hugging_face)(task)
    inputs = packed(task) if kind == "packed" else padded(task)
    flat = padded(task)
    ids, mask = (flat[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))
    features = model.bert(ids, mask).pooler_output.detach()
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    method = ClsNorm(MOMENTUM)
    method.prepare(model)
    mean, var = features.mean(0), features.var(0, unbiased=False)

    trained = model(**inputs).logits.detach().flatten()
    normal = (features - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(trained, model.classifier(normal).detach().flatten())

    model.eval()
    running_mean = MOMENTUM * mean
    running_var = (1 - MOMENTUM) + MOMENTUM * features.var(0)
    normal = (features - running_mean) / (running_var + 1e-5).sqrt()
    expected = model.classifier(normal).flatten()
    torch.testing.assert_close(model(**inputs).logits.flatten(), expected)

    method.finish(model)
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(model(**inputs).logits.flatten(), expected)
    torch.testing.assert_close(model.train()(**inputs).logits.flatten(), expected)


def test_one_row_is_normalised_by_the_running_statistics() -> None:
    model = native("SequenceClassification")
    ClsNorm().prepare(model)
    one = packed("SequenceClassification", lengths=(4,))
    before = model.cls_norm.running_mean.clone()
    trained = model(**one).logits
    assert torch.equal(model.cls_norm.running_mean, before)
    assert torch.equal(trained, model.eval()(**one).logits)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="cls-norm: got a BertForTokenClassification"):
        ClsNorm().prepare(native("TokenClassification"))
    from ...hf._models import tiny

    with pytest.raises(ValueError, match="whose classifier is a Linear behind a dropout"):
        ClsNorm().prepare(tiny("RobertaForSequenceClassification"))
