"""Quantised models against their float ones: every family, every head, padded and packed."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch

import fastbert
from fastbert.compress import quantize
from fastbert.hf import accelerate

from ..hf._models import FAMILY_NAMES, MODEL_NAMES, batch_for, masked_lm, tiny

Tensor = torch.Tensor

# Largest ||quantised - float|| / ||float|| of any output of these models: int8 keeps 7 bits of
# every factor, bf16 8 bits of the weights.
BOUNDS = {"int8-dynamic": 0.06, "int8-static": 0.12, "bf16": 0.02}
NATIVE_HEADS = [
    name for name in fastbert.__all__ if name.startswith("Bert") and name != "BertConfig"
]


def check_close(ours: Any, expected: Any, bound: float) -> None:
    assert tuple(ours.keys()) == tuple(expected.keys())
    for name, wanted in expected.items():
        if isinstance(wanted, Tensor):
            real = wanted > -1e30  # padding of question answering
            got = ours[name]
            assert got.dtype == torch.float32 and got.shape == wanted.shape, name
            error = (got[real] - wanted[real]).norm() / wanted[real].norm()
            assert error <= bound, f"{name}: {error:.4f}"


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_hugging_face_model(name: str) -> None:
    model, batch = tiny(name), batch_for(name)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = accelerate(copy.deepcopy(model))(**batch)
        for scheme in ("int8-dynamic", "bf16"):
            check_close(quantize(model, scheme)(**batch), expected, BOUNDS[scheme])
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert "_fastbert" not in model.__dict__


@pytest.mark.parametrize("name", NATIVE_HEADS)
def test_every_native_model(name: str, native: Any) -> None:
    model = native(name)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 97, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [1], [5], [7]])).long()
    call = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * (ids % 2)}
    if name == "BertForMultipleChoice":
        call = {key: x.view(2, 2, 9) for key, x in call.items()}
    with torch.no_grad():
        expected = model(**call)
        for scheme in ("int8-dynamic", "bf16"):
            check_close(quantize(model, scheme)(**call), expected, BOUNDS[scheme])


def test_packed_batches_and_hidden_states(native: Any, batches: Any) -> None:
    model = native()
    quantised = quantize(model)
    for batch in batches:
        with torch.no_grad():
            expected = model(batch=batch, output_hidden_states=True)
            got = quantised(batch=batch, output_hidden_states=True)
        assert len(got.hidden_states) == 4
        for ours, wanted in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert (ours - wanted).norm() <= 0.06 * wanted.norm()
        assert torch.equal(got.hidden_states[-1], got.last_hidden_state)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_neighbours_and_padding_do_not_matter(family: str) -> None:
    quantised = quantize(tiny(masked_lm(family)))
    batch = batch_for(masked_lm(family))
    del batch["labels"]
    with torch.no_grad():
        together = quantised(**batch, output_hidden_states=True).hidden_states[-1]
        for row, mask in enumerate(batch["attention_mask"]):
            alone = {key: x[row : row + 1, : int(mask.sum())] for key, x in batch.items()}
            single = quantised(**alone, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(single[0], together[row, mask != 0])


def test_embeddings_of_ones_own(native: Any, batches: Any) -> None:
    model = native()
    rows = model.embeddings.word_embeddings.weight[batches[0].input_ids].detach()
    batch = batches[0].replace(input_ids=None, inputs_embeds=rows)
    with torch.no_grad():
        expected = model(batch=batch).last_hidden_state
        got = quantize(model, "bf16")(batch=batch).last_hidden_state
    assert (got - expected).norm() <= BOUNDS["bf16"] * expected.norm()


def test_accelerated_and_restored_models_give_the_same(native: Any) -> None:
    plain = tiny("RobertaForSequenceClassification")
    batch = batch_for("RobertaForSequenceClassification")
    with torch.no_grad():
        expected = quantize(plain)(**batch).logits
        assert torch.equal(quantize(accelerate(plain))(**batch).logits, expected)


def test_flattened_batches_of_hugging_face() -> None:
    quantised = quantize(tiny("BertModel"))
    ids = torch.randint(1, 97, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        flat = quantised(input_ids=ids, position_ids=positions).last_hidden_state
        first = quantised(input_ids=ids[:, :4]).last_hidden_state
    assert torch.equal(flat[:, :4], first)


def test_it_is_for_inference_only(native: Any) -> None:
    quantised = quantize(native("BertForSequenceClassification"))
    assert not quantised.training and quantised.eval() is quantised
    with pytest.raises(RuntimeError, match="inference"):
        quantised.train()
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no gradients"):
        quantised(input_ids=ids, labels=torch.zeros(2, dtype=torch.int64)).loss.backward()
    for model in (quantised, quantize(tiny("BertForSequenceClassification"))):
        with pytest.raises(ValueError, match="output_attentions"):
            model(input_ids=ids, output_attentions=True)


def test_the_face_of_the_float_model(native: Any) -> None:
    model = tiny("BertForSequenceClassification")
    quantised = quantize(model)
    names = list(inspect.signature(quantised.forward).parameters)
    assert names == list(inspect.signature(model.forward).parameters)
    assert quantised.config.num_labels == model.config.num_labels
    assert quantised.scheme == "int8-dynamic" and quantised.device.type == "cpu"
    ids = torch.ones(2, 5, dtype=torch.int64)
    as_tuple = quantised(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], quantised(ids).logits)


def test_no_encoder_parameter_is_left() -> None:
    quantised = quantize(tiny("BertForMaskedLM"))
    assert all(".encoder." not in name for name in quantised.state_dict())
    assert len(list(quantised.parameters())) == len(list(tiny("BertForMaskedLM").cls.parameters()))
    assert not any(p.requires_grad for p in quantised.parameters())


def test_training_the_float_model_on_does_not_reach_the_quantised_one(native: Any) -> None:
    model = native("BertForSequenceClassification")
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        quantised = quantize(model)
        before = quantised(input_ids=ids).logits
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert torch.equal(quantised(input_ids=ids).logits, before)


def test_copies_pickles_and_threads(native: Any, batches: Any) -> None:
    quantised = quantize(native())
    with torch.no_grad():
        expected = quantised(batch=batches[0]).last_hidden_state
        for twin in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised))):
            assert torch.equal(twin(batch=batches[0]).last_hidden_state, expected)
    found: list[Tensor] = []
    fresh = copy.deepcopy(quantised)

    def call() -> None:
        with torch.no_grad():
            found.append(fresh(batch=batches[0]).last_hidden_state)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(x, expected) for x in found)


def test_keep_float(native: Any) -> None:
    model = native()
    kept = quantize(model, keep_float=[0, "layers.1.down", "attention_output"])
    assert kept.report.floating == [
        "layers.0.qkv", "layers.0.attention_output", "layers.0.up", "layers.0.down",
        "layers.1.attention_output", "layers.1.down", "layers.2.attention_output",
    ]  # fmt: skip
    assert len(kept.report.integer) == 5
    tensors = kept.encoder.tensors
    assert tensors["layers.0.up.weight"].dtype.name == "uint16"
    assert tensors["layers.1.up.weight"].dtype.name == "int8"
    with pytest.raises(ValueError, match="keep_float.*layers.7"):
        quantize(model, keep_float=["layers.7"])
    with pytest.raises(ValueError, match="keep_float.*expected a list"):
        quantize(model, keep_float="layers.1")


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
@pytest.mark.parametrize("library", ["fastbert", "transformers"])
def test_activations(activation: str, library: str, native: Any) -> None:
    if library == "fastbert":
        model = native(hidden_act=activation)
    else:
        model = tiny("BertModel", hidden_act=activation)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        check_close(quantize(model)(input_ids=ids), model(input_ids=ids), BOUNDS["int8-dynamic"])


def test_lora_is_merged() -> None:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(tiny("BertForSequenceClassification"), config).eval()
    batch = batch_for("BertForSequenceClassification")
    with torch.no_grad():
        expected = wrapped(**batch).logits
        quantised = quantize(wrapped, "bf16")
        got = quantised(**batch).logits
        assert torch.equal(wrapped(**batch).logits, expected)  # nothing was merged in place
    assert (got - expected).norm() <= BOUNDS["bf16"] * expected.norm()
    assert not any("lora" in name or "original" in name for name in quantised.state_dict())


def test_what_cannot_be_quantised_is_an_error(native: Any) -> None:
    with pytest.raises(ValueError, match="scheme: got 'int4'"):
        quantize(native(), "int4")
    with pytest.raises(ValueError, match="calibration"):
        quantize(native(), "int8-static")
    with pytest.raises(ValueError, match="model: got Linear"):
        quantize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="quantised already"):
        quantize(quantize(native()))
    with pytest.raises(ValueError, match="smooth_quant"):
        quantize(native(), smooth_quant=1.5)
    hooked = tiny("BertModel")
    hooked.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layers.1.down"):
        quantize(hooked)
    odd = tiny("BertModel", hidden_act="mish")
    with pytest.raises(ValueError, match="activation"):
        quantize(odd)


def test_bad_ids_are_errors(native: Any) -> None:
    quantised = quantize(native())
    with pytest.raises(ValueError, match="input_ids"):
        quantised(input_ids=torch.tensor([[97]]))
    with pytest.raises(ValueError, match="position"):
        quantised(input_ids=torch.ones(1, 41, dtype=torch.int64))
