"""linear against ``F.linear``, by torch's own product and by the one through fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import _matmul, linear

from ._parity import (
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
# T, K, N: the last two are large enough for the route through fp32 on every CPU.
SIZES = [(0, 64, 64), (1, 96, 64), (63, 64, 96), (200, 160, 144), (1000, 128, 128)]


@pytest.fixture(params=["amx", "avx512", "avx2"], autouse=True)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routes that a CPU takes that has bf16 matrix units, one that has none, and one on which
    BLAS is slow at few rows too."""
    monkeypatch.setattr(_matmul, "_bf16_is_slow_on_cpu", lambda: request.param != "amx")
    monkeypatch.setattr(_matmul, "_blas_is_slow_at_few_rows", lambda: request.param == "avx2")


def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, w, None if b is None else b.to(w.dtype))


def example(draw: Draw, tokens: int, inputs: int, outputs: int) -> Inputs:
    return {
        "x": draw(tokens, inputs),
        "w": draw(outputs, inputs, scale=inputs**-0.5),
        "b": draw.vector(outputs),
    }


@on_every_target
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_parity(target: Target, size: tuple[int, int, int], with_bias: bool) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, *size), draw(size[0], size[2])
    check_parity(linear, plain, inputs if with_bias else inputs | {"b": None}, grad)


@on_every_target
def test_each_gradient_alone_and_same_bits_twice(target: Target) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, 200, 160, 144), draw(200, 144)
    check_each_gradient_alone(linear, inputs, grad)
    check_same_bits(run(linear, inputs, grad), run(linear, inputs, grad))


@pytest.mark.parametrize("target", matmul_targets(only=(torch.float32,)), indirect=True)
def test_autocast(target: Target) -> None:
    draw = Draw(target)
    inputs = example(draw, 200, 160, 144)
    with torch.autocast(target.device, torch.bfloat16):
        grad = draw(200, 144).bfloat16()
        results, torchs = run(linear, inputs, grad), run(plain, inputs, grad)
    wide = {n: x.double() for n, x in inputs.items()}
    assert results["out"].dtype == torch.bfloat16
    check_results(results, torchs, run(plain, wide, grad.double()), torch.bfloat16)


@pytest.mark.parametrize(
    "target", matmul_targets(only=(torch.float32, torch.bfloat16)), indirect=True
)
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_graph_takes_the_same_routes(target: Target, tokens: int) -> None:
    """Decided when it runs: each way to multiply adds up in an order of its own."""
    draw = Draw(target)
    inputs, grad = example(draw, tokens, 160, 144), draw(tokens, 144)
    torch.compiler.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = run(linear, inputs, grad)
    check_same_bits(run(compiled, inputs, grad), expected)
    frozen = inputs | {"w": inputs["w"].detach().requires_grad_(False)}
    with torch.no_grad():
        assert torch.equal(compiled(**frozen), expected["out"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", {"x": torch.ones(8)}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("w", {"w": torch.ones(5, 7)}),
        ("w", {"w": torch.ones(5, 8, dtype=torch.float64)}),
        ("w", {"w": torch.ones(5, 8, device="meta")}),
        ("b", {"b": torch.ones(4)}),
        ("b", {"b": torch.ones(5, dtype=torch.bfloat16)}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {"x": torch.ones(3, 8), "w": torch.ones(5, 8), "b": torch.ones(5)}
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        linear(**(good | arguments))
