"""add_layer_norm_int8 is add_layer_norm, then quantize_rows."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import add_layer_norm, add_layer_norm_int8, quantize_rows

from ._targets import Draw, Target, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("add_layer_norm_int8", vectors=True), indirect=True
)


@on_every_target
@pytest.mark.parametrize("shape", [(0, 64), (1, 3), (63, 96), (5, 1000)], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_the_bits_of_one_after_the_other(
    target: Target, shape: tuple[int, int], alone: bool
) -> None:
    draw = Draw(target)
    x, residual, x_bias = draw(*shape), draw(*shape), draw.vector(shape[1])
    weight, bias = draw.vector(shape[1]), draw.vector(shape[1])
    rest = (None, weight, bias) if alone else (residual, weight, bias)
    added = {"x_bias": None if alone else x_bias, "eps": 1e-5}
    multiplier = None if alone else draw(shape[1]).float()
    y, *rows = add_layer_norm_int8(x, *rest, multiplier=multiplier, **added)
    plain = add_layer_norm(x, *rest, **added)
    assert torch.equal(y, plain)
    scaled = plain if alone else plain.float() * multiplier
    for got, expected in zip(rows, quantize_rows(scaled), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", {"x": torch.ones(8)}),
        ("residual", {"residual": torch.ones(3, 7)}),
        ("weight", {"weight": torch.ones(7)}),
        ("bias", {"bias": torch.ones(8, dtype=torch.float64)}),
        ("x_bias", {"x_bias": torch.ones(8, device="meta")}),
        ("multiplier", {"multiplier": torch.ones(7)}),
        ("multiplier", {"multiplier": torch.ones(8, dtype=torch.bfloat16)}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    ones = torch.ones(8)
    good = {"x": torch.ones(3, 8), "residual": None, "weight": ones, "bias": ones, "x_bias": None}
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        add_layer_norm_int8(**(good | arguments))
