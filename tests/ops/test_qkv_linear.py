"""qkv_linear against three ``F.linear`` side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import _matmul, qkv_linear

from ._parity import (
    Function,
    Inputs,
    check_each_gradient_alone,
    check_parity,
    check_results,
    check_same_bits,
    run,
)
from ._targets import Draw, Target, matmul_targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize("target", matmul_targets(), indirect=True)
on_float32_targets = pytest.mark.parametrize(
    "target", matmul_targets(only=(torch.float32,)), indirect=True
)
both_ways = pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
# T, H, K
SIZES = [(0, 64, 64), (1, 64, 96), (63, 96, 96), (65, 768, 64), (127, 96, 1000), (1000, 96, 64)]


def columns(linears: Function, **options: bool) -> Function:
    """``linears(x, weights, biases)`` as a function of named tensors."""

    def call(x, query, key, value, query_bias=None, key_bias=None, value_bias=None):
        return linears(x, (query, key, value), (query_bias, key_bias, value_bias), **options)

    return call


def side_by_side(x, weights, biases):
    parts = zip(weights, biases, strict=True)
    return torch.cat([F.linear(x, w, None if b is None else b.to(w.dtype)) for w, b in parts], 1)


def example(draw: Draw, tokens: int, hidden: int, width: int) -> Inputs:
    names = ("query", "key", "value")
    return (
        {"x": draw(tokens, hidden)}
        | {name: draw(width, hidden, scale=hidden**-0.5) for name in names}
        | {f"{name}_bias": draw.vector(width) for name in names}
    )


@both_ways
@on_every_target
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(target: Target, joined: bool, size: tuple[int, int, int]) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, *size), draw(size[0], 3 * size[2])
    check_parity(columns(qkv_linear, joined=joined), columns(side_by_side), inputs, grad)


@both_ways
@on_every_target
@pytest.mark.parametrize("absent", [["key_bias"], ["query_bias", "key_bias", "value_bias"]])
def test_without_biases(target: Target, joined: bool, absent: list[str]) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, 65, 64, 96), draw(65, 288)
    inputs |= dict.fromkeys(absent)
    check_parity(columns(qkv_linear, joined=joined), columns(side_by_side), inputs, grad)


@pytest.mark.parametrize("target", matmul_targets(only=(torch.bfloat16,)), indirect=True)
@pytest.mark.parametrize("slow", [False, True])
def test_both_routes_of_bf16(target: Target, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products through fp32, for CPUs without bf16 matrix units, and torch's own."""
    monkeypatch.setattr(_matmul, "_bf16_is_slow_on_cpu", lambda: slow)
    draw = Draw(target)
    inputs, grad = example(draw, 200, 160, 144), draw(200, 432)
    check_parity(columns(qkv_linear), columns(side_by_side), inputs, grad)


@both_ways
@on_every_target
def test_strided_inputs(target: Target, joined: bool) -> None:
    draw = Draw(target)
    inputs = example(draw, 64, 96, 48)
    strided = {n: torch.stack((x, x), -1)[..., 0] for n, x in inputs.items()}
    check_parity(
        columns(qkv_linear, joined=joined), columns(side_by_side), strided, draw(144, 64).t()
    )


@both_ways
@on_every_target
def test_each_gradient_alone_and_same_bits_twice(target: Target, joined: bool) -> None:
    draw, call = Draw(target), columns(qkv_linear, joined=joined)
    inputs, grad = example(draw, 65, 64, 96), draw(65, 288)
    check_each_gradient_alone(call, inputs, grad)
    check_same_bits(run(call, inputs, grad), run(call, inputs, grad))


@both_ways
@on_float32_targets
def test_output_without_autograd(target: Target, joined: bool) -> None:
    draw, call = Draw(target), columns(qkv_linear, joined=joined)
    inputs, grad = example(draw, 65, 64, 96), draw(65, 288)
    expected = run(call, inputs, grad)["out"]
    assert torch.equal(call(**inputs), expected)
    with torch.inference_mode():
        assert torch.equal(call(**inputs), expected)


@both_ways
@on_float32_targets
def test_autocast(target: Target, joined: bool) -> None:
    draw = Draw(target)
    inputs = example(draw, 127, 96, 64)
    with torch.autocast(target.device, torch.bfloat16):
        grad = draw(127, 192).bfloat16()
        results = run(columns(qkv_linear, joined=joined), inputs, grad)
        torchs = run(columns(side_by_side), inputs, grad)
    wide = {n: x.double() for n, x in inputs.items()}
    assert results["out"].dtype == torch.bfloat16
    check_results(results, torchs, run(columns(side_by_side), wide, grad.double()), torch.bfloat16)


@both_ways
def test_gradcheck(joined: bool) -> None:
    draw = Draw(Target("reference", "cpu", torch.float64, torch.float64))
    inputs = example(draw, 3, 4, 2)
    assert torch.autograd.gradcheck(
        columns(qkv_linear, joined=joined), tuple(x.requires_grad_() for x in inputs.values())
    )


@both_ways
def test_compiled(joined: bool) -> None:
    """One graph, and the numbers of eager calls."""
    draw = Draw(Target("reference", "cpu", torch.float32, torch.float32))
    call = columns(qkv_linear, joined=joined)
    inputs, grad = example(draw, 65, 64, 96), draw(65, 288)
    inputs["key_bias"] = None
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = run(call, inputs, grad)
    for name, x in run(compiled, inputs, grad).items():
        torch.testing.assert_close(x, eager[name])


WEIGHT, BIAS = torch.ones(6, 8), torch.ones(6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", {"x": torch.ones(8)}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("x", {"x": None}),
        (r"weights\[0\]", {"weights": (torch.ones(6, 7), WEIGHT, WEIGHT)}),
        (r"weights\[1\]", {"weights": (WEIGHT, torch.ones(5, 8), WEIGHT)}),
        (r"weights\[2\]", {"weights": (WEIGHT, WEIGHT, WEIGHT.double())}),
        (r"weights\[1\]", {"weights": (WEIGHT, WEIGHT.to("meta"), WEIGHT)}),
        (r"biases\[0\]", {"biases": (torch.ones(8), BIAS, BIAS)}),
        (r"biases\[2\]", {"biases": (None, None, BIAS.long())}),
        ("biases", {"biases": (BIAS, BIAS)}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {"x": torch.ones(3, 8), "weights": (WEIGHT,) * 3, "biases": (BIAS,) * 3}
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        qkv_linear(**(good | arguments))
