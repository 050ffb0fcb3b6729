"""add_layer_norm against ``F.layer_norm(residual + dropout(x + x_bias))``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.ops import add_layer_norm

from ._masks import drop, hidden_mask, seed_tensor
from ._parity import Function, Inputs, check_each_gradient_alone, check_parity, check_same_bits, run
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("add_layer_norm", vectors=True), indirect=True
)
on_float_targets = pytest.mark.parametrize(
    "target", targets("add_layer_norm", only=(torch.float32, torch.bfloat16)), indirect=True
)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("add_layer_norm"), indirect=True
)
SHAPES = [
    (0, 64), (1, 64), (1, 1000), (63, 96), (64, 768), (65, 1000), (127, 96), (127, 768), (1000, 64),
    (1000, 96),
]  # fmt: skip
SEED, OFFSET = 2**40 + 17, 7


def plain(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-12,
) -> torch.Tensor:
    z = drop(x if x_bias is None else x + x_bias.to(x.dtype), keep, p)
    z = z if residual is None else residual + z
    return F.layer_norm(z, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype), eps)


def ours(p: float = 0.0, eps: float = 1e-12) -> Function:
    def call(x, residual, x_bias, weight, bias):
        return add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, eps=eps,
            dropout_p=p, dropout_seed=seed_tensor(SEED, x.device), dropout_offset=OFFSET,
        )  # fmt: skip

    return call


def example(draw: Draw, tokens: int, hidden: int) -> Inputs:
    return {
        "x": draw(tokens, hidden),
        "residual": draw(tokens, hidden),
        "x_bias": draw.vector(hidden),
        "weight": draw.vector(hidden, scale=0.1, shift=1.0),
        "bias": draw.vector(hidden, scale=0.1),
    }


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(target: Target, shape: tuple[int, int], p: float) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, *shape), draw(*shape)
    keep = hidden_mask(*shape, p, SEED, OFFSET, target.device)
    check_parity(ours(p), lambda **tensors: plain(**tensors, keep=keep, p=p), inputs, grad)


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("absent", ["residual", "x_bias", "both"])
def test_without_residual_or_x_bias(target: Target, absent: str, p: float) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, 65, 96), draw(65, 96)
    inputs |= dict.fromkeys(("residual", "x_bias") if absent == "both" else (absent,))
    keep = hidden_mask(65, 96, p, SEED, OFFSET, target.device)
    # Without a residual dropout may leave next to nothing in a row: eps as in the other BERTs.
    check_parity(
        ours(p, eps=1e-5),
        lambda **tensors: plain(**tensors, keep=keep, p=p, eps=1e-5),
        inputs,
        grad,
    )


@on_every_target
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_magnitudes(target: Target, scale: float) -> None:
    scale = min(scale, 100.0) if target.dtype == torch.float16 else scale
    draw = Draw(target)
    inputs, grad = example(draw, 65, 768), draw(65, 768, scale=scale)
    inputs |= {"x": draw(65, 768, scale=scale), "residual": draw(65, 768, scale=scale)}
    check_parity(ours(), plain, inputs, grad)


@on_every_target
def test_mean_far_from_zero(target: Target) -> None:
    """E z^2 - (E z)^2 would lose every digit of the variance here; two passes do not."""
    draw = Draw(target)
    inputs = example(draw, 65, 768)
    shift = 1000.0 if target.dtype in (torch.float32, torch.float64) else 8.0
    inputs |= {"residual": draw(65, 768, shift=shift), "x_bias": None}
    check_parity(ours(), plain, inputs, draw(65, 768))


@on_every_target
def test_rows_without_variance(target: Target) -> None:
    """A constant row normalises to exactly 0, whatever eps: y = bias."""
    draw = Draw(target)
    inputs = example(draw, 4, 768)
    inputs |= {"residual": None, "x_bias": None}
    inputs["x"] = torch.tensor([0.0, 3.0, -512.0, 0.25]).to(inputs["x"])[:, None].expand(4, 768)
    results = run(ours(), inputs, torch.zeros_like(inputs["x"]))
    expected = inputs["bias"].to(target.dtype).expand(4, 768)
    assert torch.equal(results["out"], expected)
    assert not results["dx"].any()
    assert not results["dweight"].any()


@pytest.mark.parametrize(
    "target", targets("add_layer_norm", only=(torch.bfloat16, torch.float16)), indirect=True
)
def test_vectors_of_different_dtypes(target: Target) -> None:
    """Each vector alone may be in x's dtype or in fp32, and its gradient comes back in its own."""
    draw = Draw(target)
    inputs, grad = example(draw, 65, 96), draw(65, 96)
    for name in ("x_bias", "weight", "bias"):
        mixed = inputs | {name: inputs[name].float()}
        results = run(ours(), mixed, grad)
        assert results[f"d{name}"].dtype == torch.float32
        check_parity(ours(), plain, mixed, grad)


@on_every_target
def test_strided_inputs(target: Target) -> None:
    draw = Draw(target)
    dense, grad = example(draw, 64, 96), draw(64, 96)
    strided = {n: torch.stack((x, x), -1)[..., 0] for n, x in dense.items()}
    strided["x"] = dense["x"].t().contiguous().t()
    assert not any(x.is_contiguous() for x in strided.values())
    check_same_bits(run(ours(), strided, grad.t().contiguous().t()), run(ours(), dense, grad))


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_each_gradient_alone_and_same_bits_twice(target: Target, p: float) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, 127, 96), draw(127, 96)
    call = ours(p)
    check_each_gradient_alone(call, inputs, grad)
    check_same_bits(run(call, inputs, grad), run(call, inputs, grad))


@on_float_targets
def test_gradients_share_no_memory(target: Target) -> None:
    """Without dropout dx equals dresidual; a user who scales one in place must not scale both."""
    draw = Draw(target)
    inputs = {n: x.requires_grad_() for n, x in example(draw, 3, 64).items()}
    ours()(**inputs).sum().backward()
    expected = inputs["residual"].grad.clone()
    inputs["x"].grad.zero_()
    assert torch.equal(inputs["residual"].grad, expected)


@on_float_targets
def test_same_output_without_autograd(target: Target) -> None:
    inputs = example(Draw(target), 65, 96)
    call = ours(0.1)
    expected = run(call, inputs, torch.ones_like(inputs["x"]))["out"]
    assert torch.equal(call(**inputs), expected)
    with torch.inference_mode():
        assert torch.equal(call(**inputs), expected)


@on_cpu_backends
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("absent", ["none", "residual", "x_bias"])
def test_gradcheck(cpu_backend: str, absent: str, p: float) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    inputs = example(draw, 3, 8) | ({} if absent == "none" else {absent: None})
    present = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}
    call = ours(p, eps=1e-5)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return call(**(dict.fromkeys(inputs) | dict(zip(present, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(present.values()))


@on_cpu_backends
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(2, 200),
    scale=st.floats(1e-2, 1e3),
    shift=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_have_mean_0_and_variance_1(cpu_backend, tokens, hidden, scale, shift, seed) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64), seed)
    x = draw(tokens, hidden, scale=scale, shift=shift)
    ones, zeros = torch.ones(hidden).double(), torch.zeros(hidden).double()
    y = add_layer_norm(x, None, ones, zeros, eps=1e-30)
    assert y.mean(1).abs().lt(1e-9).all()
    assert (y.square().mean(1) - 1).abs().lt(1e-6).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", {"x": torch.ones(8)}),
        ("x", {"x": torch.ones(2, 3, 8)}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("x", {"x": None}),
        ("residual", {"residual": torch.ones(3, 9)}),
        ("residual", {"residual": torch.ones(4, 8)}),
        ("residual", {"residual": torch.ones(3, 8, dtype=torch.bfloat16)}),
        ("residual", {"residual": torch.ones(3, 8, device="meta")}),
        ("weight", {"weight": torch.ones(9)}),
        ("weight", {"weight": torch.ones(8, dtype=torch.float64)}),
        ("bias", {"bias": torch.ones(8, 1)}),
        ("bias", {"bias": 1.0}),
        ("x_bias", {"x_bias": torch.ones(7)}),
        ("x_bias", {"x_bias": torch.ones(8, device="meta")}),
        ("dropout_p", {"dropout_p": -0.1}),
        ("dropout_p", {"dropout_p": 1.0}),
        ("dropout_p", {"dropout_p": float("nan")}),
        ("dropout_seed", {"dropout_p": 0.1}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.tensor([1.0])}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.ones(1, device="meta").long()}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": 5}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "x": torch.ones(3, 8),
        "residual": torch.ones(3, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        add_layer_norm(**(good | arguments))
