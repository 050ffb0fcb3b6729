"""linear_cross_entropy, and its kernel alone, against ``F.linear`` and ``F.cross_entropy``."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import OPS, linear_cross_entropy

from ._parity import (
    ATOL,
    Function,
    Inputs,
    check_each_gradient_alone,
    check_parity,
    check_results,
    check_same_bits,
    error,
    run,
)
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("cross_entropy_rows", vectors=True), indirect=True
)
on_float32_targets = pytest.mark.parametrize(
    "target", targets("cross_entropy_rows", only=(torch.float32,)), indirect=True
)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("cross_entropy_rows"), indirect=True
)
# M, H, V
SIZES = [(1, 64, 2), (1, 96, 1000), (63, 96, 65), (64, 64, 1), (65, 768, 127), (127, 1000, 1000),
         (1000, 64, 500)]  # fmt: skip


def ours(labels: torch.Tensor, **options: object) -> Function:
    def call(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, bias, labels, **options)

    return call


def plain(labels: torch.Tensor, **options: object) -> Function:
    def call(hidden, weight, bias):
        logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, **options)

    return call


def example(draw: Draw, rows: int, hidden: int, classes: int) -> tuple[torch.Tensor, Inputs]:
    """Labels, a seventh of them ignored, and inputs that give logits of about unit size."""
    labels = draw.ids(classes, rows)
    labels[1::7] = -100
    inputs = {
        "hidden": draw(rows, hidden),
        "weight": draw(classes, hidden, scale=hidden**-0.5),
        "bias": draw.vector(classes),
    }
    return labels, inputs


@on_every_target
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(target: Target, size: tuple[int, int, int], reduction: str) -> None:
    labels, inputs = example(Draw(target), *size)
    check_parity(ours(labels, reduction=reduction), plain(labels, reduction=reduction), inputs)


@on_every_target
def test_without_bias(target: Target) -> None:
    labels, inputs = example(Draw(target), 65, 96, 127)
    check_parity(ours(labels), plain(labels), inputs | {"bias": None})


@on_float32_targets
def test_vocabulary_of_bert(target: Target) -> None:
    labels, inputs = example(Draw(target), 9, 64, 30522)
    check_parity(ours(labels), plain(labels), inputs)


@on_every_target
def test_extreme_magnitudes(target: Target) -> None:
    """Logits of some hundreds: exp() of them overflows, and some softmax rows are saturated."""
    labels, inputs = example(Draw(target), 65, 64, 127)
    inputs["weight"] = inputs["weight"] * 64
    check_parity(ours(labels), plain(labels), inputs)
    inputs["weight"] = inputs["weight"] * 2**-20
    check_parity(ours(labels), plain(labels), inputs)


@on_every_target
def test_an_ignored_label_that_is_a_class(target: Target) -> None:
    labels, inputs = example(Draw(target), 65, 64, 9)
    labels[1::7] = 3
    check_parity(ours(labels, ignore_index=3), plain(labels, ignore_index=3), inputs)


@on_every_target
@pytest.mark.parametrize("rows", [0, 5])
def test_no_label_that_counts(target: Target, rows: int) -> None:
    """As torch: the mean of nothing is nan, the sum 0, and every gradient 0."""
    labels, inputs = example(Draw(target), rows, 64, 9)
    labels.fill_(-100)
    for reduction in ("mean", "sum"):
        results = run(ours(labels, reduction=reduction), inputs)
        loss = results.pop("out")
        assert loss.isnan() if reduction == "mean" else loss == 0
        for name, grad in results.items():
            assert not grad.any(), (reduction, name)


@on_every_target
@pytest.mark.parametrize("rows_a_chunk", [1, 16, 64])
def test_chunks(target: Target, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of rows give what one gives; the last one is not full."""
    labels, inputs = example(Draw(target), 65, 96, 127)
    module = importlib.import_module("fastbert.ops.linear_cross_entropy")
    # 127 classes lie 128 apart on a GPU.
    size = (128 if target.device == "cuda" else 127) * inputs["hidden"].element_size()
    monkeypatch.setitem(module._CHUNK_BYTES, target.device, rows_a_chunk * size)
    check_parity(ours(labels), plain(labels), inputs)


@on_every_target
@pytest.mark.parametrize("rows_a_chunk", [16, 1000])
@pytest.mark.parametrize("classes", [1, 63, 64, 127])
def test_rows_of_logits_further_apart(
    target: Target, classes: int, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie on a GPU, on every device; nothing of what lies between them is ever read."""
    labels, inputs = example(Draw(target), 65, 96, classes)
    module = importlib.import_module("fastbert.ops.linear_cross_entropy")
    size = -(-classes // 64) * 64 * inputs["hidden"].element_size()
    monkeypatch.setitem(module._CHUNK_BYTES, target.device, rows_a_chunk * size)
    monkeypatch.setitem(module._ROW_MULTIPLE, target.device, 64)
    check_parity(ours(labels), plain(labels), inputs)


@on_every_target
def test_gradient_of_the_loss_is_scaled(target: Target) -> None:
    """By a power of 2, which keeps every bit, except for what becomes a denormal in fp16."""
    labels, inputs = example(Draw(target), 65, 96, 127)
    one = run(ours(labels), inputs)
    eighth = run(ours(labels), inputs, torch.full_like(one["out"], 0.125))
    for name in ("hidden", "weight", "bias"):
        if target.dtype != torch.float16:
            assert torch.equal(eighth[f"d{name}"] * 8, one[f"d{name}"])
        assert error(eighth[f"d{name}"] * 8, one[f"d{name}"].double()) <= ATOL[target.dtype]


@pytest.mark.parametrize("factor", [1.0, 2.0**16])
def test_fp16_gradients_that_only_a_grad_scaler_saves(factor: float) -> None:
    """A flat softmax over 300 classes and 200 rows: a probability over the count is 1.7e-5, times
    a feature of 1e-3 it is below fp16's smallest number until the scaler's factor is in it."""
    labels = torch.arange(200) % 300
    hidden = torch.full((200, 8), 1e-3, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(300, 8, dtype=torch.float16, requires_grad=True)
    with torch.no_grad():
        weight[::2] = 2e-3
    (linear_cross_entropy(hidden, weight, None, labels) * factor).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (F.cross_entropy(F.linear(*exact), labels) * factor).backward()
    for ours, oracle in zip((hidden, weight), exact, strict=True):
        bound = 0.01 * oracle.grad.abs().max() + 6e-8
        assert (ours.grad - oracle.grad).abs().max() <= bound


@on_float32_targets
def test_backward_twice(target: Target) -> None:
    labels, inputs = example(Draw(target), 65, 96, 127)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    loss = ours(labels)(**leaves)
    loss.backward(retain_graph=True)
    once = {n: x.grad.clone() for n, x in leaves.items()}
    loss.backward()
    for name, x in leaves.items():
        assert torch.equal(x.grad, 2 * once[name])


@on_float32_targets
def test_loss_without_gradients(target: Target) -> None:
    labels, inputs = example(Draw(target), 65, 96, 127)
    expected = run(ours(labels), inputs)["out"]
    assert torch.equal(ours(labels)(**inputs), expected)
    with torch.inference_mode():
        assert torch.equal(ours(labels)(**inputs), expected)


@on_every_target
def test_strided_inputs(target: Target) -> None:
    labels, dense = example(Draw(target), 64, 96, 127)
    strided = {n: torch.stack((x, x), -1)[..., 0] for n, x in dense.items()}
    strided_labels = torch.stack((labels, labels), -1)[:, 0]
    results, expected = run(ours(strided_labels), strided), run(ours(labels), dense)
    for name, x in expected.items():  # BLAS may take another path for another stride
        assert error(results[name], x.double()) <= 2 * ATOL[target.dtype], name


@on_every_target
def test_each_gradient_alone_and_same_bits_twice(target: Target) -> None:
    labels, inputs = example(Draw(target), 65, 96, 127)
    check_each_gradient_alone(ours(labels), inputs, None)
    check_same_bits(run(ours(labels), inputs), run(ours(labels), inputs))


@on_every_target
def test_kernel_on_strided_rows(target: Target) -> None:
    """cross_entropy_rows itself: columns of a wider matrix, the rest of which it leaves alone."""
    draw = Draw(target)
    labels = draw.ids(127, 65)
    labels[1::7] = -100
    wide, bias = draw(65, 140, scale=2.0), draw.vector(127)
    logits, before = wide[:, 5:132], wide.clone()
    scale = torch.tensor([0.25], device=target.device)
    scale = scale.double() if target.dtype == torch.float64 else scale
    launch = OPS["cross_entropy_rows"].launcher("fwd", logits, 127)

    def peer(x: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        u = x + bias.to(x.dtype)
        u = u if u.dtype == torch.float64 else u.float()
        loss = F.cross_entropy(u, labels, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, 0.25))
        return {"loss": loss.detach(), "gradient": grad}

    torchs, oracles = peer(logits, bias), peer(logits.double(), bias.double())
    loss_only = launch(logits, bias, labels, -100, None)
    assert torch.equal(wide, before)
    loss = launch(logits, bias, labels, -100, scale)
    assert torch.equal(loss, loss_only)
    check_results({"loss": loss, "gradient": logits}, torchs, oracles, target.dtype)
    assert not loss[1::7].any()
    assert not logits[1::7].any()
    assert torch.equal(wide[:, :5], before[:, :5])
    assert torch.equal(wide[:, 132:], before[:, 132:])


@on_float32_targets
def test_autocast(target: Target) -> None:
    labels, inputs = example(Draw(target), 127, 96, 127)
    results, torchs = {}, {}
    with torch.autocast(target.device, torch.bfloat16):
        results = run(ours(labels), inputs)
        torchs = run(plain(labels), inputs)
    oracles = run(plain(labels), {n: x.double() for n, x in inputs.items()})
    assert all(x.dtype == torch.float32 for x in results.values())
    check_results(results, torchs, oracles, torch.bfloat16)


@on_cpu_backends
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(cpu_backend: str, with_bias: bool, reduction: str) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    labels = torch.tensor([1, -100, 4, 0])
    inputs = [draw(4, 3), draw(5, 3), draw.vector(5)][: 2 + with_bias]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias=None: ours(labels, reduction=reduction)(hidden, weight, bias),
        [x.requires_grad_() for x in inputs],
    )


@on_cpu_backends
@pytest.mark.parametrize("label", [-1, -101, 9, 2**40])
def test_label_out_of_range(cpu_backend: str, label: int) -> None:
    target = Target(cpu_backend, "cpu", torch.float32, torch.float32)
    labels, inputs = example(Draw(target), 5, 64, 9)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"^labels.*{label}"):
        ours(labels)(**inputs)


@pytest.mark.gpu
@on_float32_targets
def test_label_out_of_range_on_a_gpu(target: Target) -> None:
    """No memory outside is touched, and the loss shows it as nan."""
    if target.backend == "reference" or target.device == "cpu":
        pytest.skip("these raise")
    labels, inputs = example(Draw(target), 5, 64, 9)
    labels[2] = 9
    assert ours(labels)(**inputs).isnan()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("reduction", {"reduction": "none"}),
        ("hidden", {"hidden": torch.ones(8)}),
        ("hidden", {"hidden": torch.ones(3, 8, dtype=torch.int64)}),
        ("weight", {"weight": torch.ones(5, 7)}),
        ("weight", {"weight": torch.ones(5)}),
        ("weight", {"weight": torch.ones(5, 8, dtype=torch.bfloat16)}),
        ("bias", {"bias": torch.ones(4)}),
        ("bias", {"bias": torch.ones(5, dtype=torch.float64)}),
        ("labels", {"labels": torch.zeros(3, dtype=torch.int32)}),
        ("labels", {"labels": torch.zeros(4, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(3, 1, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(3, dtype=torch.int64, device="meta")}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "hidden": torch.ones(3, 8),
        "weight": torch.ones(5, 8),
        "bias": torch.ones(5),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        linear_cross_entropy(**(good | arguments))
