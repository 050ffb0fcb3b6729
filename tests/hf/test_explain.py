"""explain and verify."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fastbert.hf import accelerate, explain, verify
from fastbert.ops import OPS, use_backend

from ._models import MODEL_NAMES, VOCAB, batch_for, pair, tiny


def rows_of(model: Any, **match: str) -> list[dict[str, str]]:
    return [r for r in explain(model).rows if all(r[k] == v for k, v in match.items())]


def test_every_op_has_a_row_with_its_backend() -> None:
    model = accelerate(tiny("BertForMaskedLM"))
    with use_backend("reference"):
        rows = rows_of(model, where="cpu float32")
    # No part of a float model; and the feed-forward's fused halves, which nothing takes by default.
    int8 = {"quantize_rows", "linear_int8", "add_layer_norm_int8"}
    left_out = int8 | {"quantize_rows_fp8", "linear_fp8", "feed_forward"}
    assert [row["what"] for row in rows] == [op for op in OPS if op not in left_out]
    assert {row["takes"] for row in rows} == {"reference"}
    assert all("reference is forced" in r["why"] or "cpp: " in r["why"] for r in rows)


def test_text_and_json() -> None:
    explanation = explain(accelerate(tiny("AlbertForMaskedLM"), skip_logits=True))
    text, data = str(explanation), json.loads(explanation.to_json())
    assert data["rows"] == explanation.rows
    assert text.startswith("AlbertForMaskedLM (albert)")
    assert "AlbertModel" in text and "packed" in text and "skip_logits" in text


def test_before_accelerate() -> None:
    [row] = rows_of(tiny("BertModel"), takes="original")
    assert row["why"] == "not accelerated"
    with pytest.raises(ValueError, match="Linear"):
        explain(nn.Linear(2, 2))


def test_what_is_left_alone_is_named_once_for_all_layers() -> None:
    config = peft.LoraConfig(target_modules=["query"])
    model = accelerate(peft.get_peft_model(tiny("BertModel", hidden_act="relu"), config))
    rows = {row["what"]: row["where"] for row in rows_of(model, takes="as it is")}
    assert set(rows) == {"query: Linear", "activation: ReLU"}
    assert all("(3 layers)" in where for where in rows.values())


def test_calls_that_took_the_original_path_are_counted() -> None:
    model = accelerate(tiny("BertModel"))
    batch = batch_for("BertModel")
    for _ in range(3):
        model(**batch, output_attentions=True)
    [row] = [r for r in explain(model).rows if "calls so far" in r["why"]]
    assert "output_attentions" in row["what"] and row["why"].startswith("3 ")


def test_a_decoder_inside() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = tiny("BertModel"), tiny("BertModel")
            self.decoder.config.is_decoder = True

    model = accelerate(Two())
    assert "decoder" in rows_of(model, where="decoder")[0]["why"]
    assert rows_of(model, where="encoder")[0]["takes"] == "packed"


# --- verify -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_verify_every_model(name: str) -> None:
    report = verify(accelerate(tiny(name)))
    assert report.ok, str(report)
    kinds = {row["what"] for row in report.rows}
    assert kinds == ({"output", "loss", "gradient"} if "For" in name else {"output", "gradient"})
    json.loads(report.to_json())


def test_verify_without_logits() -> None:
    report = verify(accelerate(tiny("BertForMaskedLM"), skip_logits=True))
    assert report.ok and {row["what"] for row in report.rows} == {"loss", "gradient"}


def test_verify_leaves_the_model_as_it_was() -> None:
    model = accelerate(tiny("BertForSequenceClassification", dropout=0.1)).train()
    model.bert.encoder.layer[1].eval()
    model(**batch_for("BertForSequenceClassification")).loss.backward()
    model.config.problem_type = None
    modes = [m.training for m in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert verify(model).ok
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.problem_type is None and "forward" in model.__dict__


def test_verify_on_inputs_of_ones_own() -> None:
    model = accelerate(tiny("BertForTokenClassification"))
    batch = batch_for("BertForTokenClassification")
    assert verify(model, inputs=batch).ok
    embeds = torch.randn(4, 11, 48)
    assert verify(model, inputs={"inputs_embeds": embeds}).ok


@pytest.mark.parametrize("name", ["BertForPreTraining", "DistilBertModel"])
def test_verify_in_bfloat16(name: str) -> None:
    assert verify(accelerate(tiny(name).bfloat16())).ok


def test_verify_finds_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(tiny("BertForMaskedLM"))
    layer = model.bert.encoder.layer[1]
    packed = layer.forward._packed
    layer.forward._packed = lambda x, *args: packed(x, *args) * (1 + 1e-4)
    report = verify(model)
    assert not report.ok and "failed" in str(report)
    layer.forward._packed = lambda x, *args: packed(x, *args) * float("nan")
    assert not verify(model).ok


def test_verify_several_models_and_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = tiny("BertModel"), tiny("ElectraForMaskedLM")

    report = verify(accelerate(Two()))
    assert report.ok and {row["module"] for row in report.rows} == {"one", "two"}
    with pytest.raises(ValueError, match="accelerate first"):
        verify(pair("BertModel")[0])


def test_example_tokens_are_legal() -> None:
    model = accelerate(tiny("RobertaForMaskedLM", max_position_embeddings=12))
    assert verify(model).ok
    assert model.config.vocab_size == VOCAB
