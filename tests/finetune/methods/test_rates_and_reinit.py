"""Layer-wise learning rates, and what re-initialisation changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert.finetune.methods import LayerwiseLR, Reinit
from fastbert.train import param_groups

from ._models import LAYERS, hugging_face, native


@pytest.mark.parametrize("make", [native, hugging_face])
def test_rates_are_powers_of_the_decay(make: Any) -> None:
    """Depth L + 2 for the head, down to 0 for the embeddings: with .5, powers of 2."""
    model = make("SequenceClassification")
    rates = LayerwiseLR(0.5).rates(model)
    for name, _ in model.named_parameters():
        exponent = 0
        if "embeddings" in name:
            exponent = LAYERS + 2
        elif "pooler" in name:
            exponent = 1
        elif ".layer." in name:
            exponent = LAYERS + 1 - int(name.split(".layer.")[1].split(".")[0])
        assert rates.get(name, 1.0) == 0.5**exponent, name


def test_rates_are_those_of_the_optimiser_groups() -> None:
    model = native("SequenceClassification")
    rates = LayerwiseLR(0.8).rates(model)
    named = {id(p): name for name, p in model.named_parameters()}
    for group in param_groups(model, 0.01, 0.8):
        assert {rates.get(named[id(p)], 1.0) for p in group["params"]} == {group["lr_scale"]}


def test_no_decay_no_rates() -> None:
    assert LayerwiseLR(1.0).rates(native("SequenceClassification")) == {}


@pytest.mark.parametrize("make", [native, hugging_face])
@pytest.mark.parametrize(("layers", "pooler"), [(1, True), (2, False), (0, True)])
def test_exactly_those_parts_change(make: Any, layers: int, pooler: bool) -> None:
    model = make("SequenceClassification")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    Reinit(layers, pooler, seed=3).prepare(model)
    tops = tuple(f"bert.encoder.layer.{i}." for i in range(LAYERS - layers, LAYERS))
    chosen = (*tops, "bert.pooler.") if pooler else tops
    for name, parameter in model.named_parameters():
        if not name.startswith(chosen):
            assert bool((parameter == 7.0).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert bool((parameter == 1.0).all()), name
        else:  # initializer_range is .2
            assert bool((parameter.abs() <= 0.4).all()), name
            assert 0.12 < float(parameter.std().detach()) < 0.22, name


def test_a_seed_is_a_weight() -> None:
    def weights(seed: int | None, torch_seed: int = 0) -> torch.Tensor:
        model = native("SequenceClassification")
        torch.manual_seed(torch_seed)
        Reinit(seed=seed).prepare(model)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(5), weights(5, torch_seed=1))
    assert not torch.equal(weights(5), weights(6))
    assert torch.equal(weights(None), weights(None))
    assert not torch.equal(weights(None), weights(None, torch_seed=1))


def test_a_seed_leaves_the_generator_alone() -> None:
    model = native("SequenceClassification")
    before = torch.get_rng_state()
    Reinit(seed=1).prepare(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="reinit: layers: got 4, the model has 3"):
        Reinit(4).prepare(native("SequenceClassification"))
    with pytest.raises(ValueError, match="reinit: got a Linear, which has no list of layers"):
        Reinit(1).prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer_decay: got 0.9, but Linear has no numbered layers"):
        LayerwiseLR(0.9).rates(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layerwise-lr: decay: got 0.0, expected a number > 0"):
        LayerwiseLR(0.0)
