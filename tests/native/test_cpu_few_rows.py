"""The C++ product of few rows, on every ISA that this machine has, and when it is taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fastbert import _native, ops

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

from fastbert.ops import _cpp, _matmul

from ._isas import isa  # noqa: F401

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def example(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + k + n)
    x, w = (torch.randn(size, k, generator=generator).to(dtype) for size in (rows, n))
    return x, w


@every_dtype
@pytest.mark.parametrize("k", [1, 7, 8, 16, 67, 768])
def test_product(dtype: torch.dtype, k: int) -> None:
    """Into the middle columns of a wider matrix, whose others it leaves alone."""
    for rows, n in itertools.product((0, 1, 2, 3, 4, 5, 7, 16, 128), (1, 2, 3, 6, 7, 50)):
        x, w = example(rows, k, n, dtype)
        wide = torch.full((rows, n + 5), float("nan"), dtype=dtype)
        out = _cpp.few_rows_product(x, w, wide[:, 2 : n + 2])
        expected = x.double() @ w.double().t()
        # Sums of k products in fp32 (Higham, Accuracy and Stability, eq. 3.5), rounded once to
        # bf16, of 8 significant bits.
        bound = k * 2.0**-24 * (x.double().abs() @ w.double().abs().t())
        bound += (2.0**-8 if dtype == torch.bfloat16 else 0.0) * expected.abs()
        assert ((out.double() - expected).abs() <= bound * (1 + 2.0**-8)).all(), (rows, n)
        assert torch.equal(out, wide[:, 2 : n + 2])
        assert wide[:, :2].isnan().all() and wide[:, n + 2 :].isnan().all(), (rows, n)


@every_dtype
def test_rows_and_weights_need_not_be_contiguous(dtype: torch.dtype) -> None:
    x, w = example(5, 96, 50, dtype)
    apart = [torch.stack((t, t), -1)[..., 0] for t in (x, w)]
    expected, out = torch.empty(5, 50, dtype=dtype), torch.empty(5, 50, dtype=dtype)
    assert not apart[0].is_contiguous()
    assert torch.equal(_cpp.few_rows_product(*apart, out), _cpp.few_rows_product(x, w, expected))


@every_dtype
def test_a_row_does_not_depend_on_threads_or_on_the_others(dtype: torch.dtype) -> None:
    x, w = example(9, 96, 500, dtype)
    former = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_cpp.few_rows_product(x, w, torch.empty(9, 500, dtype=dtype)))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(result, results[0]) for result in results)
    for row in (0, 4, 8):
        alone = _cpp.few_rows_product(x[row : row + 1], w, torch.empty(1, 500, dtype=dtype))
        assert torch.equal(alone[0], results[0][row])


def test_special_values_reach_their_row_and_column_alone() -> None:
    x, w = example(5, 40, 7, torch.float32)
    x[1, 39], w[3, 8] = float("inf"), float("nan")
    out = _cpp.few_rows_product(x, w, torch.empty(5, 7))
    expected = F.linear(x, w)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("rows", [1, _matmul._FEW_ROWS, _matmul._FEW_ROWS + 1])
@pytest.mark.parametrize("slow", [True, False])
def test_taken_for_few_rows_where_blas_is_slow(
    rows: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def product(*arguments: torch.Tensor) -> torch.Tensor:
        taken.append(len(arguments[0]))
        return own(*arguments)

    own = _cpp.few_rows_product
    monkeypatch.setattr(_cpp, "few_rows_product", product)
    monkeypatch.setattr(_matmul, "_blas_is_slow_at_few_rows", lambda: slow)
    x, w = example(rows, 96, 96, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x, w), F.linear(x, w), atol=1e-4, rtol=1e-5)
        qkv = ops.qkv_linear(x, (w, w, w), (None, None, None))
        torch.testing.assert_close(qkv, F.linear(x, w).repeat(1, 3), atol=1e-4, rtol=1e-5)
        ops.feed_forward(x, w, None, w)
    assert taken == ([rows] * 6 if slow and rows <= _matmul._FEW_ROWS else [])
    taken.clear()
    wide = torch.zeros(rows, _matmul._FEW_ELEMENTS // rows + 1)  # as few rows, of too many elements
    with torch.no_grad():
        ops.linear(wide, wide)
    assert taken == []
    with ops.use_backend("reference"), torch.no_grad():
        taken.clear()
        ops.linear(x, w)
    assert taken == []


class Other(torch.Tensor):
    """As a quantised weight is: what its memory holds is its own affair."""


def test_other_classes_of_tensors_multiply_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matmul, "_blas_is_slow_at_few_rows", lambda: True)
    x, w = example(5, 96, 96, torch.float32)
    assert _matmul.few_rows(x, w) and _matmul.few_rows(x, torch.nn.Parameter(w))
    for other in (w.as_subclass(Other), torch.nn.Parameter(w.as_subclass(Other))):
        assert not _matmul.few_rows(x, other) and not _matmul.few_rows(other, w)
        with torch.no_grad():
            assert type(ops.linear(x, other)) is Other


def test_a_graph_leaves_other_classes_of_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matmul, "_blas_is_slow_at_few_rows", lambda: True)
    called: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        called[:] = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return graph

    x, w = example(5, 96, 96, torch.float32)
    for weight, target in ((w, torch.ops.fastbert.linear.default), (TwoTensor(w, w), F.linear)):
        torch.compiler.reset()
        torch.compile(ops.linear, backend=backend, fullgraph=True)(x, weight)
        assert called == [target]


@pytest.mark.parametrize(
    ("flags", "slow", "wide"),
    [({"avx2"}, True, 8), ({"avx2", "avx512f"}, False, 128), ({"asimd", "bf16"}, False, 128)],
)
def test_processors(
    flags: set[str], slow: bool, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was measured, all products stay with BLAS."""
    monkeypatch.setattr(_matmul.device, "cpu_flags", lambda: frozenset(flags))
    _matmul._blas_is_slow_at_few_rows.cache_clear()
    try:
        assert (_matmul._blas_is_slow_at_few_rows(), _matmul._wide_rows()) == (slow, wide)
    finally:
        _matmul._blas_is_slow_at_few_rows.cache_clear()
