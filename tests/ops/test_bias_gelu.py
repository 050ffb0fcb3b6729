"""bias_gelu against ``F.gelu(x + bias)``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import bias_gelu

from ._parity import check_each_gradient_alone, check_parity, check_same_bits, run
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("bias_gelu", vectors=True), indirect=True
)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("bias_gelu"), indirect=True
)
SHAPES = [
    (0, 64), (1, 1), (1, 1000), (63, 96), (64, 768), (65, 1000), (127, 64), (127, 96), (1000, 96),
    (1000, 768),
]  # fmt: skip


def plain(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none") -> torch.Tensor:
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


@on_every_target
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(target: Target, shape: tuple[int, int], approximate: str) -> None:
    draw = Draw(target)
    inputs = {"x": draw(*shape, scale=2.0), "bias": draw.vector(shape[1])}
    check_parity(
        lambda x, bias: bias_gelu(x, bias, approximate=approximate),
        lambda x, bias: plain(x, bias, approximate),
        inputs,
        grad=draw(*shape),
    )


@on_every_target
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_without_bias(target: Target, approximate: str) -> None:
    draw = Draw(target)
    check_parity(
        lambda x: bias_gelu(x, approximate=approximate),
        lambda x: plain(x, None, approximate),
        {"x": draw(65, 96, scale=2.0)},
        grad=draw(65, 96),
    )


@on_every_target
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_magnitudes(target: Target, approximate: str) -> None:
    """Both tails, the neighbourhood of 0, and u^3 of the tanh form near the end of fp32."""
    largest = 1e4 if target.dtype == torch.float16 else 1e12
    values = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.5, -0.75, 3.0, -3.0, 5.5, -5.5, 9.0, -9.0]
    values += [13.5, -13.5, 30.0, -30.0, 1e3, -1e3, largest, -largest]
    x = torch.tensor(values, dtype=torch.float64).to(target.device, target.dtype)[:, None]

    def ours(x: torch.Tensor) -> torch.Tensor:
        return bias_gelu(x, approximate=approximate)

    check_parity(ours, lambda x: plain(x, None, approximate), {"x": x}, grad=torch.ones_like(x))
    # The criterion measures by the largest value; the rest must hold on its own.
    small = x[:-2]
    check_parity(
        ours, lambda x: plain(x, None, approximate), {"x": small}, grad=torch.ones_like(small)
    )
    tails = run(ours, {"x": x}, torch.ones_like(x))
    assert torch.equal(tails["out"][-2:, 0], torch.stack((x[-2, 0], torch.zeros_like(x[-1, 0]))))
    assert tails["dx"][-2:, 0].tolist() == [1.0, 0.0]


@on_every_target
def test_any_leading_shape_and_stride(target: Target) -> None:
    draw = Draw(target)
    bias = draw.vector(2 * 24)[::2]
    x, grad = draw(5, 24, 3).transpose(1, 2), draw(3, 24, 5).permute(2, 0, 1)
    strided = run(bias_gelu, {"x": x, "bias": bias}, grad)
    dense = run(bias_gelu, {"x": x.contiguous(), "bias": bias.contiguous()}, grad.contiguous())
    check_same_bits(strided, dense)
    vector = bias_gelu(x[0, 0].contiguous(), bias.contiguous())
    assert torch.equal(vector, dense["out"][0, 0])


@on_every_target
def test_each_gradient_alone_and_same_bits_twice(target: Target) -> None:
    draw = Draw(target)
    inputs = {"x": draw(127, 96), "bias": draw.vector(96)}
    check_each_gradient_alone(bias_gelu, inputs, grad := draw(127, 96))
    check_same_bits(run(bias_gelu, inputs, grad), run(bias_gelu, inputs, grad))


@on_cpu_backends
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(cpu_backend: str, approximate: str, with_bias: bool) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    inputs = [draw(4, 7).requires_grad_(), draw.vector(7).requires_grad_()][: 1 + with_bias]
    assert torch.autograd.gradcheck(
        lambda *inputs: bias_gelu(*inputs, approximate=approximate), inputs
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("approximate", {"approximate": "sigmoid"}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("x", {"x": torch.tensor(1.0)}),
        ("x", {"x": [1.0] * 8}),
        ("bias", {"bias": torch.ones(9)}),
        ("bias", {"bias": torch.ones(1, 8)}),
        ("bias", {"bias": torch.ones(8, dtype=torch.float64)}),
        ("bias", {"bias": torch.ones(8, dtype=torch.int64)}),
        ("bias", {"bias": torch.ones(8, device="meta")}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {"x": torch.ones(3, 8), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        bias_gelu(**(good | arguments))
