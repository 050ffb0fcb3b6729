"""quantize_rows_fp8 and linear_fp8: the definition, the rounding, and a float Linear beside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import device
from fastbert.ops import OPS, _registry, linear_fp8, quantize_rows_fp8

from ._targets import Draw, Target, targets

pytestmark = pytest.mark.usefixtures("poison")

FP8 = torch.float8_e4m3fn
on_every_target = pytest.mark.parametrize(
    "target",
    targets("linear_fp8", only=(torch.float32, torch.bfloat16)),
    indirect=True,
)


@on_every_target
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (63, 96), (64, 1000)], ids=str)
def test_rows(target: Target, shape: tuple[int, int]) -> None:
    """Every row's largest number becomes 448; the others are off by half a step of e4m3's three
    bits of mantissa, or of the 2^-9 between its smallest numbers."""
    x = Draw(target)(*shape, scale=3.0)
    if len(x):
        x[-1, 0] = 400.0
    q, scale = quantize_rows_fp8(x)
    assert q.dtype == FP8 and scale.dtype == torch.float32
    largest = x.float().abs().amax(1) if len(x) else scale
    torch.testing.assert_close(scale, largest / 448)
    exact = x.double() / scale.double()[:, None]
    error = (q.double() - exact).abs()
    assert (
        error <= torch.maximum(exact.abs() * 2**-4, torch.full_like(exact, 2**-10)) * 1.0001
    ).all()
    if len(x):
        assert (q.float().abs().amax(1) == 448).all()


@on_every_target
def test_a_row_of_zeros(target: Target) -> None:
    q, scale = quantize_rows_fp8(torch.zeros(2, 5, device=target.device))
    assert (q.float() == 0).all() and (scale == 0).all()


@on_every_target
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [(0, 64, 48), (1, 16, 16), (17, 96, 70), (65, 768, 100)], ids=str)
def test_the_definition(target: Target, size: tuple[int, int, int], activation: str) -> None:
    rows, width, columns = size
    draw = Draw(target)
    q, scale = quantize_rows_fp8(draw(rows, width))
    weight, weight_scale = quantize_rows_fp8(draw(columns, width, scale=width**-0.5))
    bias = draw(columns).float()
    for b in (bias, None):
        y = linear_fp8(q, scale, weight, weight_scale, b, activation=activation, dtype=target.dtype)
        exact = q.double() @ weight.double().t() * scale.double()[:, None] * weight_scale.double()
        exact = exact if b is None else exact + b.double()
        if activation != "none":
            exact = F.gelu(exact, approximate="tanh" if activation == "gelu_tanh" else "none")
        assert y.dtype == target.dtype
        # GPUs up to sm_90 add e4m3 products with 14 bits, 128 of them at a time.
        step = 2**-8 if target.dtype == torch.bfloat16 else 2e-3 if y.is_cuda else 3e-6
        torch.testing.assert_close(y.double(), exact, rtol=step, atol=step)


@on_every_target
def test_a_linear_through_fp8_errs_by_the_steps(target: Target) -> None:
    """Relative errors of 2^-4 at most in each factor; together far less, since they cancel."""
    draw = Draw(target)
    x, w = draw(40, 256).float(), draw(30, 256).float()
    y = linear_fp8(*quantize_rows_fp8(x), *quantize_rows_fp8(w))
    bound = (x.abs() @ w.abs().t()) * (2 * 2**-4 + 2**-8) + 1e-3
    error = (y - x @ w.t()).abs()
    assert (error <= bound).all()
    assert 0 < error.mean() < 0.1 * bound.mean()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("q", {"q": torch.ones(3, 8)}),
        ("q", {"q": torch.ones(8).to(FP8)}),
        ("weight", {"weight": torch.ones(5, 7).to(FP8)}),
        ("weight", {"weight": torch.ones(5, 8, dtype=torch.int8)}),
        ("weight", {"weight": torch.ones(5, 8, device="meta").to(FP8)}),
        ("scale", {"scale": torch.ones(2)}),
        ("scale", {"scale": torch.ones(3, dtype=torch.bfloat16)}),
        ("weight_scale", {"weight_scale": torch.ones(4)}),
        ("bias", {"bias": torch.ones(5, dtype=torch.float64)}),
        ("activation", {"activation": "relu"}),
        ("dtype", {"dtype": torch.int32}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "q": torch.ones(3, 8).to(FP8),
        "scale": torch.ones(3),
        "weight": torch.ones(5, 8).to(FP8),
        "weight_scale": torch.ones(5),
        "bias": torch.ones(5),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        linear_fp8(**(good | arguments))


def test_rows_want_a_float_matrix() -> None:
    for x in (torch.ones(3), torch.ones(3, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="^x: got .*expected"):
            quantize_rows_fp8(x)


def test_gpus_without_fp8_units_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "triton_reason", lambda: None)
    for capability, words in (((8, 0), "for sm_89 and later"), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr(device, "cuda_capability", lambda index, found=capability: found)
        reason = _registry.refusal(OPS["linear_fp8"], "triton", "cuda", torch.bfloat16, 64)
        assert (reason is None) if words is None else (words in str(reason))
    assert _registry.refusal(OPS["linear_fp8"], "reference", "cuda", torch.bfloat16, 64) is None
