"""gather_rows and scatter_rows against indexing: they move numbers, so every bit must match."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.ops import gather_rows, scatter_rows

from ._parity import check_same_bits, run
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_gather_targets = pytest.mark.parametrize("target", targets("gather_rows"), indirect=True)
on_scatter_targets = pytest.mark.parametrize("target", targets("scatter_rows"), indirect=True)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("gather_rows"), indirect=True
)
# Rows of the larger matrix, rows of the smaller one, width.
SIZES = [
    (0, 0, 64), (1, 0, 64), (1, 1, 1000), (64, 63, 96), (65, 65, 768), (127, 1, 96),
    (1000, 150, 768), (1000, 127, 3),
]  # fmt: skip


def scattered(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    y = torch.zeros(num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    y[index] = x
    return y


@on_gather_targets
@pytest.mark.parametrize(("rows", "count", "width"), SIZES)
def test_gather(target: Target, rows: int, count: int, width: int) -> None:
    draw = Draw(target)
    x, index, grad = draw(rows, width), draw.ascending(rows, count), draw(count, width)
    results = run(lambda x: gather_rows(x, index), {"x": x}, grad)
    check_same_bits(results, {"out": x[index], "dx": scattered(grad, index, rows)})


@on_scatter_targets
@pytest.mark.parametrize(("rows", "count", "width"), SIZES)
def test_scatter(target: Target, rows: int, count: int, width: int) -> None:
    draw = Draw(target)
    x, index, grad = draw(count, width), draw.ascending(rows, count), draw(rows, width)
    results = run(lambda x: scatter_rows(x, index, rows), {"x": x}, grad)
    check_same_bits(results, {"out": scattered(x, index, rows), "dx": grad[index]})


@on_gather_targets
def test_strided_inputs(target: Target) -> None:
    draw = Draw(target)
    x, index = draw(48, 65).t(), torch.stack((draw.ascending(65, 20),) * 2, -1)[:, 0]
    grad = draw(48, 20).t()
    results = run(lambda x: gather_rows(x, index), {"x": x}, grad)
    check_same_bits(results, {"out": x[index], "dx": scattered(grad, index, 65)})
    results = run(lambda x: scatter_rows(x, index, 65), {"x": x[:20]}, draw(48, 65).t())
    assert torch.equal(results["out"], scattered(x[:20], index, 65))


@on_gather_targets
def test_every_bit_is_moved(target: Target) -> None:
    """-0, infinities, nan and denormals come through as they are."""
    tiny = torch.finfo(target.dtype).smallest_normal / 4
    values = [-0.0, float("inf"), -float("inf"), float("nan"), tiny, 1.0]
    x = torch.tensor([values, values[::-1]], dtype=target.dtype, device=target.device)
    index = torch.tensor([1], device=target.device)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(gather_rows(x, index).view(integers), x[1:].view(integers))
    assert torch.equal(scatter_rows(x[1:], index, 2)[1].view(integers), x[1].view(integers))
    assert not scatter_rows(x[1:], index, 2)[0].view(integers).any()


@on_cpu_backends
@given(
    rows=st.integers(0, 80),
    width=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_gather_undoes_scatter(cpu_backend, rows, width, share, seed) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float32, torch.float32), seed)
    index = draw.ascending(rows, int(share * rows))
    x, full = draw(len(index), width), draw(rows, width)
    assert torch.equal(gather_rows(scatter_rows(x, index, rows), index), x)
    kept = torch.zeros(rows, 1)
    kept[index] = 1
    assert torch.equal(scatter_rows(gather_rows(full, index), index, rows), full * kept + 0.0)


@on_cpu_backends
def test_gradcheck(cpu_backend: str) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    index = torch.tensor([0, 2, 5])
    many, few = draw(6, 3).requires_grad_(), draw(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), many)
    assert torch.autograd.gradcheck(lambda x: scatter_rows(x, index, 6), few)


@on_cpu_backends
@pytest.mark.parametrize(
    "index", [[0, 1, 1], [0, 2, 1], [0, 1, 6], [-1, 0, 1], [0, 1, 2**40]], ids=str
)
def test_index_that_does_not_ascend_in_range(cpu_backend: str, index: list[int]) -> None:
    with pytest.raises(ValueError, match="^index"):
        gather_rows(torch.ones(6, 4), torch.tensor(index))
    with pytest.raises(ValueError, match="^index"):
        scatter_rows(torch.ones(3, 4), torch.tensor(index), 6)


@pytest.mark.parametrize(
    ("name", "x", "index"),
    [
        ("x", torch.ones(6), torch.arange(3)),
        ("x", torch.ones(3, 4, dtype=torch.int32), torch.arange(3)),
        ("x", [[1.0]], torch.arange(3)),
        ("index", torch.ones(3, 4), torch.arange(3, dtype=torch.int32)),
        ("index", torch.ones(3, 4), torch.ones(3, 1, dtype=torch.int64)),
        ("index", torch.ones(3, 4), [0, 1, 2]),
        ("index", torch.ones(3, 4), torch.arange(3, device="meta")),
    ],
)
def test_bad_input(name: str, x: object, index: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        gather_rows(x, index)
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        scatter_rows(x, index, 6)


def test_scatter_needs_as_many_indices_as_rows() -> None:
    with pytest.raises(ValueError, match=r"^index: got .*expected int64 \(3,\)"):
        scatter_rows(torch.ones(3, 4), torch.arange(2), 6)


def test_scatter_num_rows() -> None:
    with pytest.raises(ValueError, match="^num_rows: got -1"):
        scatter_rows(torch.ones(0, 4), torch.arange(0), -1)
