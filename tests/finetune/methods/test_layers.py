"""The aggregations of all layers against their formulas on the hidden states of a plain model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastbert
from fastbert.finetune.methods import GatedLayers, Method, ScalarMix, SqueezeExcitation, parse
from fastbert.finetune.methods.structure import NOTE

from ._models import LENGTHS, TASKS, gradients, hugging_face, native, packed, padded

Tensor = torch.Tensor
METHODS = (ScalarMix(), SqueezeExcitation(), GatedLayers())


def formula(method: Method, mix: Any, states: list[Tensor]) -> Tensor:
    """What the head is to read for one sequence, from L states (n, H)."""
    h = torch.stack(states)
    if isinstance(method, ScalarMix):
        weights = mix.scalars.exp() / mix.scalars.exp().sum()
        return mix.scale * sum(w * x for w, x in zip(weights, states, strict=True))
    if isinstance(method, SqueezeExcitation):
        z = h.mean((1, 2))
        inner = torch.relu(mix.squeeze.weight @ z + mix.squeeze.bias)
        s = torch.sigmoid(mix.excite.weight @ inner + mix.excite.bias)
        return (s[:, None, None] * h).sum(0) / s.sum()
    alpha = (h @ mix.importance.weight[0]).softmax(0)
    a = (alpha[..., None] * h).sum(0)
    both = torch.cat([h[-1], a], 1)
    g = torch.sigmoid(both @ mix.gate.weight.T + mix.gate.bias)
    return g * h[-1] + (1 - g) * a


def prepared(method: Method, model: Any) -> Any:
    method.prepare(model)
    with torch.no_grad():
        for parameter in model.layer_mix.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def logits_of(task: str, output: Any) -> Tensor:
    if task == "QuestionAnswering":
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def head(task: str, model: Any, states: list[Tensor]) -> Tensor:
    """Logits of the states of each sequence, by the head's own modules."""
    if task == "TokenClassification":
        return torch.cat([model.classifier(x) for x in states])
    if task == "QuestionAnswering":
        return torch.cat([model.qa_outputs(x) for x in states])
    pooled = torch.stack([torch.tanh(model.bert.pooler.dense(x[0])) for x in states])
    scores = model.classifier(pooled)
    return scores.view(-1, 2) if task == "MultipleChoice" else scores


@pytest.mark.parametrize("kind", ["packed", "padded", "plain", "accelerated"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("task", TASKS)
def test_the_head_reads_the_formula(task: str, method: Method, kind: str) -> None:
    model = (native if kind in ("packed", "padded") else hugging_face)(task).eval()
    flat = padded(task)
    ids, mask = (flat[name].view(-1, max(LENGTHS)) for name in ("input_ids", "attention_mask"))
    hidden = model.bert(ids, mask, output_hidden_states=True).hidden_states[1:]
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    prepared(method, model)
    states = [
        formula(method, model.layer_mix, [h[row, :n] for h in hidden])
        for row, n in enumerate(LENGTHS)
    ]
    ours = logits_of(task, model(**(packed(task) if kind == "packed" else flat)))
    if task in ("TokenClassification", "QuestionAnswering") and kind != "packed":
        ours = ours[mask != 0]
    torch.testing.assert_close(ours, head(task, model, states))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_gradients_reach_all_layers_and_the_mix(method: Method) -> None:
    """And are Hugging Face's, with the same weights and no padding."""
    task, lengths = "SequenceClassification", (4, 4)
    ours, theirs = prepared(method, native(task)), prepared(method, hugging_face(task))
    ours.load_state_dict(theirs.state_dict())
    ours(**packed(task, lengths=lengths)).loss.backward()
    theirs(**padded(task, lengths=lengths)).loss.backward()
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys() == dict(ours.named_parameters()).keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, msg=name)
        assert g.any(), name


def test_a_fresh_mix_is_the_mean_and_a_fresh_gate_nearly_the_last() -> None:
    inputs, seen = packed("TokenClassification"), []
    plain = native("TokenClassification").eval()
    hidden = plain.bert(**{"batch": inputs["batch"]}, output_hidden_states=True).hidden_states[1:]
    for method in METHODS[:2]:
        model = native("TokenClassification").eval()
        method.prepare(model)
        with torch.no_grad():
            if isinstance(method, SqueezeExcitation):
                for parameter in model.layer_mix.parameters():
                    parameter.zero_()
        seen.append(model.bert(batch=inputs["batch"]).last_hidden_state)
        torch.testing.assert_close(seen[-1], torch.stack(hidden).mean(0))
    model = native("TokenClassification").eval()
    GatedLayers(bias=30.0).prepare(model)
    torch.testing.assert_close(model.bert(batch=inputs["batch"]).last_hidden_state, hidden[-1])


def test_layer_dropout_leaves_layers_out() -> None:
    """Of 3 layers with p = .5 each subset is kept with probability 1/8, all of them with 2/8: when
    none is left, none is dropped."""
    model = native("SequenceClassification")
    ScalarMix(0.5).prepare(model)
    mix = model.layer_mix.train()
    ones = [torch.eye(3, dtype=torch.float64)[i : i + 1] for i in range(3)]
    torch.manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(2000):
        kept = tuple((mix(ones, None)[0] > 0).int().tolist())
        weights = mix(ones, None)[0]
        assert float(weights.sum().detach()) == pytest.approx(1.0)
        counts[kept] = counts.get(kept, 0) + 1
    assert len(counts) == 7
    for kept, count in counts.items():
        expected = 500 if kept == (1, 1, 1) else 250
        assert abs(count - expected) < 5 * expected**0.5, kept
    mix.eval()
    torch.testing.assert_close(mix(ones, None)[0], torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_to_a_folder_and_back(method: Method, tmp_path: Path) -> None:
    model, inputs = (
        prepared(method, native("SequenceClassification")),
        packed("SequenceClassification"),
    )
    expected = model(**inputs).logits
    method.finish(model)
    model.save_pretrained(tmp_path)
    config = fastbert.BertConfig.from_json(tmp_path / "config.json")
    assert config.extra[NOTE] == [method.name]
    again = fastbert.BertForSequenceClassification(config).double().eval()
    parse("+".join(config.extra[NOTE])).prepare(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(again(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["packed", "accelerated"])
def test_a_copy_is_independent(kind: str) -> None:
    task = "SequenceClassification"
    model = (native if kind == "packed" else hugging_face)(task)
    inputs = packed(task) if kind == "packed" else padded(task)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    prepared(METHODS[1], model)
    before = model(**inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.layer_mix.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(twin(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


def test_no_state_outlives_its_pass() -> None:
    model = native("SequenceClassification")
    ScalarMix().prepare(model)
    model(**packed("SequenceClassification"))
    assert model.layer_mix._outputs == []


def test_an_empty_sequence_is_no_trouble() -> None:
    lengths = (3, 0, 2)
    batch = fastbert.PackedBatch.from_sequences([[1] * n for n in lengths])
    model = prepared(SqueezeExcitation(), native("SequenceClassification"))
    logits = model(batch=batch).logits
    logits[::2].sum().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


def test_what_does_not_fit_is_named() -> None:
    model = native("SequenceClassification")
    ScalarMix().prepare(model)
    with pytest.raises(ValueError, match="gated-layers: the model has an aggregation"):
        GatedLayers().prepare(model)
    model = native("SequenceClassification")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="scalar-mix: gradient checkpointing is on"):
        ScalarMix().prepare(model)
    from ...hf._models import tiny

    with pytest.raises(ValueError, match="scalar-mix: got a AlbertForSequenceClassification"):
        ScalarMix().prepare(tiny("AlbertForSequenceClassification"))
