"""feed_forward against two ``F.linear`` and a ``F.gelu``."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import _registry, feed_forward, use_backend

from ._parity import (
    Function,
    Inputs,
    check_each_gradient_alone,
    check_parity,
    check_results,
    check_same_bits,
    run,
)
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("bias_gelu", vectors=True), indirect=True
)
on_float32_targets = pytest.mark.parametrize(
    "target", targets("bias_gelu", only=(torch.float32,)), indirect=True
)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("bias_gelu"), indirect=True
)
# T, H, I
SIZES = [(0, 64, 96), (1, 64, 256), (63, 96, 64), (65, 768, 96), (127, 64, 1000), (1000, 64, 96)]


def ours(approximate: str = "none") -> Function:
    return lambda x, w1, b1, w2: feed_forward(x, w1, b1, w2, approximate=approximate)


def plain(approximate: str = "none") -> Function:
    def call(x, w1, b1, w2):
        pre = F.linear(x, w1, None if b1 is None else b1.to(w1.dtype))
        return F.linear(F.gelu(pre, approximate=approximate), w2)

    return call


def example(draw: Draw, tokens: int, hidden: int, inner: int) -> Inputs:
    return {
        "x": draw(tokens, hidden),
        "w1": draw(inner, hidden, scale=hidden**-0.5),
        "b1": draw.vector(inner),
        "w2": draw(hidden, inner, scale=inner**-0.5),
    }


@on_every_target
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(target: Target, size: tuple[int, int, int], approximate: str) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, *size), draw(*size[:2])
    check_parity(ours(approximate), plain(approximate), inputs, grad)


@on_every_target
def test_without_bias(target: Target) -> None:
    draw = Draw(target)
    inputs, grad = example(draw, 65, 64, 96), draw(65, 64)
    check_parity(ours(), plain(), inputs | {"b1": None}, grad)


@on_every_target
@pytest.mark.parametrize("tokens", [1, 1024, 1025, 2100])
def test_inference_goes_in_parts(target: Target, tokens: int) -> None:
    """Without autograd the tokens pass in parts of 1024; no seam may show."""
    inputs = example(Draw(target), tokens, 32, 48)
    check_results(
        {"out": ours()(**inputs)},
        {"out": plain()(**inputs)},
        {"out": plain()(**{n: x.double() for n, x in inputs.items()})},
        target.dtype,
    )


@on_every_target
def test_strided_inputs(target: Target) -> None:
    draw = Draw(target)
    inputs = example(draw, 64, 96, 48)
    strided = {n: torch.stack((x, x), -1)[..., 0] for n, x in inputs.items()}
    check_parity(ours(), plain(), strided, draw(96, 64).t())


@on_every_target
def test_each_gradient_alone_and_same_bits_twice(target: Target) -> None:
    draw = Draw(target)
    inputs = example(draw, 65, 64, 96)
    check_each_gradient_alone(ours(), inputs, grad := draw(65, 64))
    check_same_bits(run(ours(), inputs, grad), run(ours(), inputs, grad))


@on_float32_targets
def test_autocast(target: Target) -> None:
    draw = Draw(target)
    inputs = example(draw, 127, 96, 64)
    with torch.autocast(target.device, torch.bfloat16):
        grad = draw(127, 96).bfloat16()
        results = run(ours(), inputs, grad)
        torchs = run(plain(), inputs, grad)
    oracles = run(plain(), {n: x.double() for n, x in inputs.items()}, grad.double())
    assert results["out"].dtype == torch.bfloat16
    check_results(results, torchs, oracles, torch.bfloat16)


@on_cpu_backends
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(cpu_backend: str, approximate: str) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    inputs = [x.requires_grad_() for x in example(draw, 3, 4, 5).values()]
    assert torch.autograd.gradcheck(ours(approximate), inputs)


# ------------------------------------------------------------- GELU in a product's epilogue

module = importlib.import_module("fastbert.ops.feed_forward")  # the package has its function so
HALVES = [frozenset({"fwd"}), frozenset({"bwd"}), frozenset({"fwd", "bwd"})]
each_fusion = pytest.mark.parametrize("fused", HALVES, ids=lambda halves: "+".join(sorted(halves)))


@pytest.mark.parametrize(
    "target",
    [
        t
        for t in targets("bias_gelu", vectors=True, only=(torch.bfloat16, torch.float16))
        if t.values[0].backend == "triton"
    ],
    indirect=True,
)
@each_fusion
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("size", [*SIZES, (1000, 768, 3072)], ids=str)
def test_parity_of_the_fused_halves(
    target: Target, fused: frozenset, size: tuple[int, int, int], approximate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FUSED", fused)
    draw = Draw(target)
    inputs, grad = example(draw, *size), draw(*size[:2])
    check_parity(ours(approximate), plain(approximate), inputs, grad)


@each_fusion
def test_the_fused_halves_by_their_reference(
    fused: frozenset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients whichever half is fused, each alone or all; and nothing where only w2's is
    wanted."""
    monkeypatch.setattr(module, "_fuses", lambda half, *matrices: half in fused)
    draw = Draw(Target("reference", "cpu", torch.float64, torch.float64))
    inputs, grad = example(draw, 65, 64, 96), draw(65, 64)
    with use_backend("reference"):
        check_parity(ours(), plain(), inputs, grad)
        check_each_gradient_alone(ours(), inputs, grad)
        check_results(
            {"out": ours()(**inputs)}, *[{"out": plain()(**inputs)}] * 2, dtype=torch.float64
        )


def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing unless asked for; then only what the kernels' descriptors take, where Triton is."""
    x, w = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(24, 16, dtype=torch.bfloat16)
    chosen = "triton"
    monkeypatch.setattr(_registry.Op, "choice", lambda *args: chosen)
    assert not module.FUSED and not module._fuses("fwd", x, w)
    monkeypatch.setattr(module, "FUSED", frozenset({"fwd"}))
    assert module._fuses("fwd", x, w) and not module._fuses("bwd", x, w)
    narrow = torch.ones(24, 12, dtype=torch.bfloat16)
    shifted = torch.ones(65, dtype=torch.bfloat16)[1:].view(4, 16)
    for other in (x.float(), x.double(), x.t().contiguous().t(), narrow, shifted):
        assert (
            not module._fuses("fwd", other, w)
            and not module._fuses("fwd", x, other.to(w))
            or other.dtype != w.dtype
        )
    chosen = "cuda"
    assert not module._fuses("fwd", x, w)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("approximate", {"approximate": "quick"}),
        ("x", {"x": torch.ones(8)}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("w1", {"w1": torch.ones(6, 7)}),
        ("w1", {"w1": torch.ones(6, 8, dtype=torch.float64)}),
        ("w1", {"w1": torch.ones(8)}),
        ("w2", {"w2": torch.ones(8, 7)}),
        ("w2", {"w2": torch.ones(8, 6, device="meta")}),
        ("b1", {"b1": torch.ones(8)}),
        ("b1", {"b1": torch.ones(6, dtype=torch.bfloat16)}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "x": torch.ones(3, 8), "w1": torch.ones(6, 8), "b1": torch.ones(6), "w2": torch.ones(8, 6)
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        feed_forward(**(good | arguments))
