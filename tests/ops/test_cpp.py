"""What only the C++ backend has: several instruction sets and a number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastbert import _native
from fastbert.ops import _cpp, use_backend

from ._parity import check_results, check_same_bits, run
from ._samples import samples
from ._targets import Draw, Target, targets

pytestmark = pytest.mark.usefixtures("poison")

AVAILABLE = _cpp.available_isas() if _native.cpu_reason() is None else []
ISAS = [name for name in ("avx512", "avx2", "portable") if name in AVAILABLE]  # others share these
FLOAT32 = Target("cpp", "cpu", torch.float32, torch.float32)
KERNELS = [name for name, sample in samples(FLOAT32, 0.1).items() if sample.kernels is not None]
PURE_KERNELS = [name for name in KERNELS if samples(FLOAT32, 0.1)[name].pure]

on_cpp_targets = pytest.mark.parametrize(
    "target", [p for p in targets("attention") if p.values[0].backend == "cpp"], indirect=True
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    former = _cpp.isa()
    _cpp.set_isa(request.param)
    yield request.param
    _cpp.set_isa(former)


@on_cpp_targets
@pytest.mark.parametrize("name", KERNELS)
def test_every_instruction_set(target: Target, isa: str, name: str) -> None:
    """Each holds the criterion, with dropout on; the reference, tested elsewhere, stands in."""
    sample = samples(target, 0.1)[name]
    results = run(sample.call, sample.inputs, sample.grad)
    with use_backend("reference"):
        torchs = run(sample.call, sample.inputs, sample.grad)
        wide = {n: x.double() for n, x in sample.inputs.items()}
        grad = None if sample.grad is None else sample.grad.double()
        oracles = run(sample.call, wide, grad)
    assert _cpp.isa() == isa
    check_results(results, torchs, oracles, target.dtype)


@on_cpp_targets
@pytest.mark.parametrize("name", PURE_KERNELS)
def test_any_number_of_threads_gives_the_same_bits(
    target: Target, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples(target, 0.1, lengths=(0, 700, 1, 299, 1000))[name]  # work for every thread
    results = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(_cpp, "_num_threads", lambda count=count: count)
        results.append(run(sample.call, sample.inputs, sample.grad))
    for other in results[1:]:
        check_same_bits(other, results[0])


@on_cpp_targets
def test_loss_kernel_on_any_number_of_threads(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Draw(target)
    logits, bias, labels = draw(500, 300), draw.vector(300), draw.ids(300, 500)
    results = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(_cpp, "_num_threads", lambda count=count: count)
        gradient = logits.clone()
        loss = _cpp.cross_entropy_rows(gradient, bias, labels, -100, torch.ones(1))
        results.append({"loss": loss, "gradient": gradient})
    for other in results[1:]:
        check_same_bits(other, results[0])


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpp, "_forced_threads", None)
    assert _cpp._num_threads() == torch.get_num_threads()
    monkeypatch.setattr(_cpp, "_forced_threads", "3")  # FASTBERT_NUM_THREADS, checked by device
    assert _cpp._num_threads() == 3


def test_unknown_instruction_set() -> None:
    if not ISAS:
        pytest.skip(str(_native.cpu_reason()))
    with pytest.raises(ValueError, match="portable"):
        _cpp.set_isa("sse9")
    assert _cpp.isa() in AVAILABLE
