"""Static scales: thresholds on distributions whose best one is known, and whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert.compress import quantize
from fastbert.compress.calibrate import BINS, METHODS, histogram, input_scales
from fastbert.compress.quantize import Plan
from fastbert.packed import PackedBatch


def threshold(method: str, x: torch.Tensor) -> float:
    largest = float(x.abs().max())
    return METHODS[method](histogram(x, largest), largest)


def squared_error(x: torch.Tensor, t: float) -> float:
    step = t / 127
    return float((x - (x / step).round().clamp(-127, 127) * step).square().mean())


def test_uniform_values_are_not_cut() -> None:
    x = torch.linspace(-3, 3, 200_001)
    for method in METHODS:
        assert threshold(method, x) == pytest.approx(3.0, rel=0.02), method


def test_an_outlier_is_cut_by_all_but_max() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1_000_001), torch.tensor([20.0])])
    assert threshold("max", x) == 20.0
    for method in ("percentile", "entropy", "mse"):
        assert 0.6 < threshold(method, x) < 4.0, method


def test_percentile_keeps_all_but_one_in_a_hundred_thousand() -> None:
    x = torch.arange(1, 1_000_001, dtype=torch.float32)
    assert threshold("percentile", x) == pytest.approx(999_990, abs=1_000_000 / BINS)
    few = torch.tensor([1.0, 2.0, 3.0])
    assert threshold("percentile", few) == 3.0


@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_mse_is_the_threshold_of_least_error(kind: str) -> None:
    torch.manual_seed(0)
    draws = {
        "normal": torch.distributions.Normal(0.0, 1.0),
        "laplace": torch.distributions.Laplace(0.0, 1.0),
        "student": torch.distributions.StudentT(3.0),
    }
    x = draws[kind].sample((200_000,))
    found = squared_error(x, threshold("mse", x))
    largest = float(x.abs().max())
    best = min(squared_error(x, largest * i / 200) for i in range(1, 201))
    assert found <= 1.05 * best


def test_nothing_but_zeros() -> None:
    x = torch.zeros(1000)
    assert all(METHODS[m](histogram(x, 0.0), 0.0) == 0.0 for m in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_static_models(method: str, native: Any, batches: list[PackedBatch]) -> None:
    model = native()
    quantised = quantize(model, "int8-static", calibration=batches, calibrate=method)
    tensors = quantised.encoder.tensors
    assert sum(name.endswith(".input_scale") for name in tensors) == 12
    with torch.no_grad():
        for batch in batches:
            expected = model(batch=batch).last_hidden_state
            got = quantised(batch=batch).last_hidden_state
            assert (got - expected).norm() <= 0.12 * expected.norm()


def test_scales_are_the_largest_inputs(native: Any, batches: list[PackedBatch]) -> None:
    model = native()
    scales = input_scales(Plan(model, "int8-static").weights, batches, "max", {})
    seen: list[float] = []
    model.encoder.layer[0].register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0].abs().max()))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch=batch)
    assert scales["layers.0.qkv"] == pytest.approx(max(seen) / 127, rel=1e-5)


def test_calibration_data_in_all_its_forms(native: Any) -> None:
    model = native()
    ids = [[5, 6, 7, 8], [9, 10]]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    forms: dict[str, list[Any]] = {
        "ids": ids,
        "packed": [PackedBatch.from_sequences(ids)],
        "padded": [{"input_ids": torch.tensor([ids[0], [9, 10, 0, 0]]), "attention_mask": mask}],
        "iterator": iter(ids),  # type: ignore[dict-item]
    }
    scales = {
        name: [
            float(x[0])
            for key, x in quantize(model, "int8-static", calibration=form).encoder.tensors.items()
            if key.endswith("input_scale")
        ]
        for name, form in forms.items()
    }
    for name, found in scales.items():
        assert found == pytest.approx(scales["ids"], rel=1e-5), name


@pytest.mark.parametrize(
    "data, message",
    [("a text", "got str"), ([], "no tokens"), ([object()], "item of object"), (["a"], "tokenizer"),
     ([{"labels": [1]}], "without input_ids")],
)  # fmt: skip
def test_bad_calibration_data(data: Any, message: str, native: Any) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(native(), "int8-static", calibration=data)
    with pytest.raises(ValueError, match="calibrate"):
        quantize(native(), "int8-static", calibration=[[1]], calibrate="median")
