"""SmoothQuant: exact before rounding, better after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastbert.compress import quantize, torch_path
from fastbert.compress.quantize import Plan
from fastbert.compress.smooth import factors, smoothing
from fastbert.compress.torch_path import quantized_linear
from fastbert.compress.weights import quantize_weight
from fastbert.packed import PackedBatch


def test_factors_are_equation_4() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 6), torch.randn(4, 6)
    x[:, 5] = weight[:, 4] = 0.0
    s = factors(x.abs().amax(0), weight, 0.6)
    for j in range(4):
        wanted = x[:, j].abs().max() ** 0.6 / weight[:, j].abs().max() ** 0.4
        assert float(s[j]) == pytest.approx(float(wanted), rel=1e-6)
    assert s[4] == s[5] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_exact_in_float(alpha: float, native: Any, batches: list[PackedBatch]) -> None:
    weights = Plan(native(), "int8-dynamic").weights
    s = smoothing(weights, batches, alpha)
    assert set(s) == {f"layers.{i}.{kind}" for i in range(3) for kind in ("qkv", "up")}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = weights.tensors[f"{name}.weight"], weights.tensors[f"{name}.bias"]
        if name not in s:
            return F.linear(x, weight, bias)
        return F.linear((x.double() / s[name]), weight.double() * s[name]).float() + bias

    for batch in batches:
        plain, _ = torch_path.encode(
            weights.config, weights.tensors, batch,
            linear=lambda n, x: F.linear(x, weights.tensors[f"{n}.weight"],
                                         weights.tensors[f"{n}.bias"]),
        )  # fmt: skip
        smooth, _ = torch_path.encode(weights.config, weights.tensors, batch, linear=linear)
        torch.testing.assert_close(smooth, plain, rtol=1e-4, atol=1e-5)


def test_an_outlier_channel_costs_less() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 96), torch.randn(48, 96), torch.zeros(48)
    x[:, 7] *= 100
    s = factors(x.abs().amax(0), weight, 0.5)

    def error(x: torch.Tensor, weight: torch.Tensor) -> float:
        q, scale = (torch.from_numpy(a) for a in quantize_weight(weight))
        return float((quantized_linear(x, q, scale, bias) - exact).norm() / exact.norm())

    exact = x @ weight.T
    assert error(x / s, weight * s) < 0.5 * error(x, weight)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_models(scheme: str, native: Any, batches: list[PackedBatch]) -> None:
    model = native()
    with torch.no_grad():
        for norm in [
            model.embeddings.LayerNorm,
            *(x.output.LayerNorm for x in model.encoder.layer),
        ]:
            norm.weight[3] = 25.0
    errors = []
    for alpha in (None, 0.5):
        quantised = quantize(model, scheme, calibration=batches, smooth_quant=alpha)
        with torch.no_grad():
            expected, got = model(batch=batches[0]), quantised(batch=batches[0])
        difference = got.last_hidden_state - expected.last_hidden_state
        errors.append(float(difference.norm() / expected.last_hidden_state.norm()))
    assert errors[1] < errors[0] < 0.2


def test_dynamic_needs_no_data_and_gives_the_same_twice(native: Any) -> None:
    first, second = (quantize(native(), smooth_quant=0.75).encoder.tensors for _ in range(2))
    assert sum(name.endswith(".input_multiplier") for name in first) == 6
    assert all((first[name] == second[name]).all() for name in first)


def test_linears_in_bf16_are_as_they_were(native: Any) -> None:
    plain = quantize(native(), keep_float=["up"], smooth_quant=None).encoder.tensors
    smooth = quantize(native(), keep_float=["up"], smooth_quant=0.75).encoder.tensors
    assert (plain["layers.1.up.weight"] == smooth["layers.1.up.weight"]).all()
    assert "layers.1.up.input_multiplier" not in smooth
