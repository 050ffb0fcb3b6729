"""accelerate and restore: what they put on a model, and what the model still can do afterwards."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertForMaskedLM, BertModel, ElectraForPreTraining

from fastbert.hf import accelerate, explain, restore
from fastbert.hf.replacement import Replacement
from fastbert.ops import BackendError

from ._models import (
    FAMILY_NAMES,
    TASK_NAMES,
    batch_for,
    check_parity,
    lengths_mask,
    masked_lm,
    pair,
    run,
    tiny,
)


def same_outputs(ours: Any, other: Any, name: str) -> None:
    batch = batch_for(name)
    torch.testing.assert_close(ours(**batch)[0], other(**batch)[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_accelerate_changes_no_parameter_and_restore_undoes_it(family: str) -> None:
    model = tiny(masked_lm(family))
    before = {n: p for n, p in model.named_parameters()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    keys, kind = list(model.state_dict()), type(model)
    assert accelerate(model) is model
    assert type(model) is kind and list(model.state_dict()) == keys
    assert all(p is before[n] for n, p in model.named_parameters())
    batch = batch_for(masked_lm(family))
    model(**batch)
    assert restore(model) is model
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert torch.equal(model(**batch).logits, tiny(masked_lm(family))(**batch).logits)


def test_no_class_is_patched() -> None:
    forwards = {c: c.forward for c in (BertModel, BertForMaskedLM)}
    original, ours = pair("BertForMaskedLM")
    assert all(c.forward is f for c, f in forwards.items())
    assert "forward" not in original.__dict__ and "forward" in ours.__dict__


def test_accelerate_twice_is_harmless() -> None:
    model = accelerate(tiny("BertForMaskedLM"))
    first = model.__dict__["forward"]
    accelerate(model, skip_logits=True)
    assert model.__dict__["forward"] is first and first.skip_logits
    restore(restore(model))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", TASK_NAMES)
def test_signature_is_the_originals(name: str) -> None:
    """transformers.Trainer drops the columns that a signature does not name."""
    original, ours = pair(name)
    assert inspect.signature(ours.forward) == inspect.signature(original.forward)


def test_deepcopy_stands_alone() -> None:
    name = "BertForMaskedLM"
    original, ours = pair(name)
    twin = copy.deepcopy(ours)
    for module in twin.modules():
        replacement = module.__dict__.get("forward")
        assert replacement is None or replacement.module is module
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    same_outputs(twin, original, name)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pickle_and_torch_save(family: str) -> None:
    name = masked_lm(family)
    original, ours = pair(name)
    same_outputs(pickle.loads(pickle.dumps(ours)), original, name)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    same_outputs(loaded, original, name)
    assert isinstance(loaded.__dict__["forward"], Replacement)
    loaded.load_state_dict(original.state_dict())


def test_dtype_and_device_moves() -> None:
    name = "BertForMaskedLM"
    original, ours = pair(name)
    check_parity(original.bfloat16(), ours.bfloat16(), batch_for(name))
    original, ours = (m.to(torch.float64) for m in pair(name))
    same_outputs(ours, original, name)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_resize_token_embeddings(family: str) -> None:
    name = masked_lm(family)
    original, ours = pair(name)
    for model in (original, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(120, mean_resizing=False)
    batch = batch_for(name)
    batch["input_ids"][0, 1] = 115
    check_parity(original, ours, batch)


def test_frozen_parameters_get_no_gradient() -> None:
    name = "BertForSequenceClassification"
    original, ours = pair(name)
    for model in (original, ours):
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
    check_parity(original, ours, batch_for(name))
    ours.bert.requires_grad_(False)
    ours.zero_grad()
    ours(**batch_for(name)).loss.backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = tiny("BertModel"), tiny("DistilBertModel", seed=3)

    def forward(self, **batch: Any) -> torch.Tensor:
        types = batch.pop("token_type_ids")
        query = self.query(**batch, token_type_ids=types).pooler_output
        return query + self.document(**batch).last_hidden_state[:, 0]


def test_models_inside_a_module_of_the_users_own() -> None:
    wrapper = Wrapper()
    batch = batch_for("BertModel")
    expected = wrapper(**batch)
    accelerate(wrapper)
    assert isinstance(wrapper.document.__dict__["forward"], Replacement)
    torch.testing.assert_close(wrapper(**batch), expected)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_nothing_supported_inside(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*bert, roberta"):
        accelerate(model)
    with pytest.raises(ValueError, match="Module"):
        accelerate("bert-base-uncased")  # type: ignore[type-var]


class OwnForward(BertForMaskedLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(input_ids, **kwargs).logits * 2


class OwnInit(BertForMaskedLM):
    pass


def test_subclasses() -> None:
    config = tiny("BertForMaskedLM").config
    model = accelerate(OwnForward(config).eval())
    assert "forward" not in model.__dict__ and "forward" in model.bert.__dict__
    batch = batch_for("BertForMaskedLM", lengths_mask((11,) * 4))
    del batch["labels"]
    output = model(**batch)
    torch.testing.assert_close(output, restore(model)(**batch))
    assert "forward" in accelerate(OwnInit(config)).__dict__


# --- what cannot be fused -----------------------------------------------------------------------


def left(model: Any) -> str:
    return str(explain(model))


def test_hook_on_a_linear() -> None:
    original, ours = pair("BertModel")
    seen = []
    for model in (original, ours):
        linear = model.encoder.layer[1].attention.self.query
        linear.register_forward_hook(lambda module, args, y: seen.append(y.shape) or y * 1.5)
    check_parity(original, ours, batch_for("BertModel"))
    assert seen[-1] == (23, 48)
    assert "query: Linear with hooks" in left(ours)


@pytest.mark.parametrize(
    "path",
    ["attention.self", "output", "attention.output.LayerNorm", "output.dropout", "intermediate"],
)
def test_hook_inside_a_layer(path: str) -> None:
    """The layer runs as it is, so that the hook sees what it always saw."""
    original, ours = pair("BertModel")
    shapes: list[list[Any]] = [[], []]
    for model, seen in zip((original, ours), shapes, strict=True):
        inner = model.encoder.layer[1].get_submodule(path)
        inner.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0].shape))
    check_parity(original, ours, batch_for("BertModel"))
    assert set(shapes[1]) == set(shapes[0])
    assert path in left(ours)
    with pytest.raises(BackendError, match=path):
        accelerate(ours, strict=True)


def test_hook_inside_a_layer_and_rows_without_any_token() -> None:
    _, ours = pair("BertModel")
    ours.encoder.layer[1].output.register_forward_hook(lambda m, a, y: None)
    for lengths in ((0, 5, 0, 3), (0, 0, 0, 0)):
        output = ours(**batch_for("BertModel", lengths_mask(lengths)))[0]
        output.sum().backward()
        assert torch.isfinite(output).all()


@pytest.mark.parametrize("path", ["embeddings", "embeddings.word_embeddings"])
def test_hook_on_embeddings(path: str) -> None:
    original, ours = pair("BertForMaskedLM")
    for model in (original, ours):
        model.bert.get_submodule(path).register_forward_hook(lambda m, a, y: y * 1.3)
    check_parity(original, ours, batch_for("BertForMaskedLM"))
    assert "embeddings" in left(ours)


@pytest.mark.parametrize("path", ["bert", "bert.encoder", "cls", "bert.encoder.layer.1"])
def test_hook_on_a_model(path: str) -> None:
    original, ours = pair("BertForPreTraining")
    kinds: list[list[Any]] = [[], []]
    for model, seen in zip((original, ours), kinds, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, args, y, seen=seen: seen.append(type(y))
        )
    batch = batch_for("BertForPreTraining")
    check_parity(original, ours, batch)
    assert set(kinds[1]) == set(kinds[0])


def test_a_layer_called_by_itself() -> None:
    original, ours = pair("BertModel")
    x = torch.randn(2, 5, 48)
    expected = original.encoder.layer[0](x)
    assert torch.equal(ours.encoder.layer[0](x), expected)
    assert torch.equal(ours.encoder.layer[0](hidden_states=x), expected)


def test_layer_replaced_by_the_users_own() -> None:
    class Scaled(nn.Module):
        def __init__(self, dense: nn.Module) -> None:
            super().__init__()
            self.dense = dense

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dense(x) * 0.5

    original, ours = pair("BertModel")
    for model in (original, ours):
        layer = model.encoder.layer[0]
        layer.intermediate.dense = Scaled(layer.intermediate.dense)
    check_parity(original, ours, batch_for("BertModel"))
    assert "up: Scaled" in left(ours)


def test_layers_added_and_removed_later() -> None:
    original, ours = pair("BertModel")
    fresh = tiny("BertModel", seed=5).encoder.layer[0]
    for model in (original, ours):
        model.encoder.layer = nn.ModuleList([model.encoder.layer[2], copy.deepcopy(fresh)])
    check_parity(original, ours, batch_for("BertModel"))


@pytest.mark.parametrize("name", ["BertForTokenClassification", "RobertaForSequenceClassification"])
def test_a_head_that_reads_across_tokens(name: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(48, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = self.out(x.cumsum(-2) / 10)
            return mixed if "Token" in name else mixed[:, -1]

    original, ours = pair(name)
    torch.manual_seed(0)
    original.classifier = Mixing()
    ours.classifier = copy.deepcopy(original.classifier)
    batch = batch_for(name, lengths_mask((11,) * 4))
    assert "classifier is a Mixing" in left(ours)
    check_parity(original, ours, batch)
    with pytest.raises(BackendError, match="Mixing"):
        accelerate(ours, strict=True)


def test_summaries_of_other_tokens() -> None:
    original, ours = pair("ElectraForMultipleChoice", summary_type="mean")
    batch = batch_for("ElectraForMultipleChoice", lengths_mask((11,) * 4))
    check_parity(original, ours, batch)
    assert "'mean'" in left(ours)


def test_a_forward_from_elsewhere_stays() -> None:
    model = tiny("BertForMaskedLM")
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    forward = model.forward
    accelerate(model)
    assert model.forward is forward and "forward" in model.bert.__dict__
    model.bert.forward = forward
    with pytest.raises(ValueError, match="another library"):
        accelerate(restore(model))


def test_wrapped_after_accelerate_then_restored() -> None:
    name = "BertForMaskedLM"
    original, ours = pair(name)
    inner = ours.forward
    ours.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    same_outputs(ours, original, name)
    batch = batch_for(name)
    assert torch.equal(restore(ours)(**batch).logits, original(**batch).logits)


def test_strict_names_all_that_is_left() -> None:
    model = tiny("BertModel", hidden_act="relu")
    with pytest.raises(BackendError, match="activation: ReLU"):
        accelerate(model, strict=True)
    assert "forward" not in model.__dict__
    accelerate(tiny("BertModel"), strict=True)


def test_replicas_of_data_parallel_serve_themselves() -> None:
    ours = accelerate(ElectraForPreTraining(tiny("ElectraForPreTraining").config))
    replica = ours._replicate_for_data_parallel()
    assert replica.forward.module is replica and ours.forward.module is ours


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_takes_the_original_path() -> None:
    original, ours = pair("BertModel")
    ids = torch.randint(2, 90, (2, 5))
    traced = torch.jit.trace(ours, ids, check_trace=False, strict=False)
    other = torch.randint(2, 90, (2, 5))
    torch.testing.assert_close(traced(other)["last_hidden_state"], original(other)[0])
    assert any("traced" in reason for reason in ours._fastbert.fallbacks)


@pytest.mark.parametrize("first", ["accelerate", "fully_shard"])
def test_fully_sharded(first: str, tmp_path: Path) -> None:
    """FSDP2 gathers a layer's parameters in a hook: layers are called as modules."""
    name = "BertForMaskedLM"
    original, ours = pair(name)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        if first == "fully_shard":
            restore(ours)
        mesh = init_device_mesh("cpu", (1,))
        for layer in ours.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        accelerate(ours, strict=True)
        batch = batch_for(name)
        theirs, mine = run(original, batch), run(ours, batch)
        torch.testing.assert_close(mine.loss, theirs.loss)
        for key, gradient in mine.gradients.items():
            expected = theirs.gradients[key]
            torch.testing.assert_close(gradient.full_tensor(), expected, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
