"""adamw_step and total_norm as C++ computes them, over tensors of every size and dtype."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator

import pytest
import torch

from fastbert import _native
from fastbert.ops import BackendError, _cpp, use_backend
from fastbert.ops.optimizer import Hyper, Slot, Tables, adamw_step, total_norm

pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Nothing, less than a vector, vectors and a rest, one block of 16,384 exactly, and more.
SIZES = (1, 0, 15, 16, 1000, 16384, 0, 16385, 50001)
KINDS = [(FP32, None), (BF16, None), (FP32, BF16), (BF16, BF16)]
BETAS, EPS, SCALE = (0.9, 0.999), 1e-6, 3.0

AVAILABLE = _cpp.available_isas() if _native.cpu_reason() is None else []
ISAS = [name for name in ("avx512", "avx2", "portable") if name in AVAILABLE]  # others share these


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    if not AVAILABLE:
        assert not _native.build_info(), _native.cpu_reason()
        pytest.skip(str(_native.cpu_reason()))
    with use_backend("cpp"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    former = _cpp.isa()
    _cpp.set_isa(request.param)
    yield request.param
    _cpp.set_isa(former)


def slots_of(
    kinds: list[tuple[torch.dtype, torch.dtype | None]] = KINDS, step: float = 3.0
) -> list[Slot]:
    """Slots in the middle of training, with unlike learning rates, decays and numbers of steps."""
    draw = torch.Generator().manual_seed(0)
    slots = []
    for grad_dtype, copy_dtype in kinds:
        for i, size in enumerate(SIZES):
            p = torch.randn(size, generator=draw)
            rate = 0.01 * (1 + i % 2)
            slots.append(
                Slot(
                    param=p,
                    grad=torch.randn(size, generator=draw).to(grad_dtype),
                    exp_avg=torch.randn(size, generator=draw) * 0.1,
                    exp_avg_sq=torch.randn(size, generator=draw).square() * 0.01,
                    copy=None if copy_dtype is None else torch.zeros_like(p, dtype=copy_dtype),
                    step=torch.tensor(step + 100 * i),
                    lr=torch.tensor(rate) if i % 4 < 2 else rate,
                    weight_decay=0.1 if i % 3 else 0.0,
                )
            )
    return slots


def exact(slot: Slot, bias_correction: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """The new parameter and moments, in fp64."""
    p, g, m, v = (x.double() for x in slot[:4])
    g = g / scale
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    c1 = c2 = 1.0
    if bias_correction:
        c1, c2 = (1 - beta ** float(slot.step) for beta in BETAS)
    u = (m / c1) / ((v / c2).sqrt() + EPS) + slot.weight_decay * p
    return p - float(slot.lr) * u, m, v


def step(slots: list[Slot], bias_correction: bool = True, scale: float | None = SCALE) -> None:
    grad_scale = None if scale is None else torch.tensor(scale)
    adamw_step(slots, Hyper(BETAS, EPS, bias_correction), Tables(), grad_scale)


@pytest.mark.parametrize(("scale", "bias_correction"), [(SCALE, False), (None, True)])
def test_a_step(isa: str, scale: float | None, bias_correction: bool) -> None:
    slots = slots_of()
    expected = [exact(slot, bias_correction, scale or 1.0) for slot in slots]
    grads = [slot.grad.clone() for slot in slots]
    step(slots, bias_correction, scale)
    for slot, (p, m, v), grad in zip(slots, expected, grads, strict=True):
        torch.testing.assert_close(slot.exp_avg.double(), m, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(slot.exp_avg_sq.double(), v, rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(slot.param.double(), p, rtol=2e-6, atol=1e-6)
        assert torch.equal(slot.grad, grad)  # read, and not written back
        assert slot.copy is None or torch.equal(slot.copy, slot.param.to(BF16))


@pytest.mark.parametrize("number", [1.0, 2.0, 10.0, 200.0, 1e6])
def test_the_bias_correction_is_precise_at_any_step(number: float) -> None:
    """1 - beta^step is as small as .001 and as large as 1."""
    slots = slots_of([(FP32, None)], step=number)
    expected = [exact(slot, True, 1.0)[0] for slot in slots]
    before = [slot.param.double() for slot in slots]
    step(slots, scale=None)
    for slot, p, old in zip(slots, expected, before, strict=True):
        torch.testing.assert_close(slot.param.double() - old, p - old, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("scale", [SCALE, math.inf, math.nan])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_no_numbers_go_where_they_go_in_torchs(bad: float, scale: float) -> None:
    """A gradient, and a scale, of no number; neighbours are what they are without it."""
    results = []
    for backend in ("cpp", "reference"):
        slots = slots_of([(FP32, None)])
        slots[-1].grad[[0, 777]] = bad
        with use_backend(backend):
            step(slots, scale=scale)
        results.append(slots)
    for mine, theirs in zip(*results, strict=True):
        for a, b in zip(mine[2:4] + mine[:1], theirs[2:4] + theirs[:1], strict=True):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-6, equal_nan=True)


def test_subnormal_moments_do_not_stay() -> None:
    """x86 takes ten times as long with them: there they are 0. m that is 0.9 times the smallest
    subnormal, rounded, would be that for ever."""
    p, m, v = torch.ones(100), torch.full((100,), 2.0**-149), torch.full((100,), 1e-12)
    step([Slot(p, torch.zeros(100), m, v, None, torch.tensor(1000.0), 0.01, 0.0)])
    flushes = platform.machine() in ("x86_64", "AMD64")
    assert torch.equal(m, torch.full((100,), 0.0 if flushes else 2.0**-149))
    assert torch.equal(p, torch.ones(100))
    assert float(torch.tensor(1e-40) * 0.5) != 0.0  # and only there: the thread is as it was


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(_cpp, "_num_threads", lambda threads=threads: threads)
        slots = slots_of()
        norm = total_norm([slot.grad for slot in slots])
        step(slots)
        results.append([norm, *(x for slot in slots for x in slot[:4])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_autograd_notices_the_step() -> None:
    """A graph that needs the old values is no longer walked."""
    slot = slots_of([(FP32, BF16)])[4]
    slot.param.requires_grad_()
    loss = slot.param.square().sum()
    with torch.no_grad():
        step([slot])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_the_kernel_does_not_take_is_torchs_and_an_error_if_it_is_forced() -> None:
    one, columns = torch.ones(4), torch.ones(2, 4).t()
    rest = (None, torch.tensor(1.0), 0.01, 0.0)
    double = one.double()
    for slot, reason in (
        (Slot(double, double, double.clone(), double.clone(), *rest), "not torch.float64"),
        (Slot(one, one.half(), one.clone(), one.clone(), *rest), "with torch.float16"),
        (Slot(one, one, one.clone(), one.clone(), one.half(), *rest[1:]), "copy to torch.float16"),
        (Slot(columns, columns, columns.clone(), columns.clone(), *rest), "contiguous"),
    ):
        with pytest.raises(BackendError, match=f"'cpp' is forced but cannot serve.*{reason}"):
            step([slot])
        before = slot.param.clone()
        with use_backend("auto"):
            step([slot])
        assert (slot.param < before).all()


# --- total_norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP64,), (FP32, BF16), (BF16, FP64, FP32)])
def test_the_norm(isa: str, dtypes: tuple[torch.dtype, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=draw).to(t) for n in SIZES for t in dtypes]
    expected = torch.cat([x.double() for x in tensors]).norm()
    norm = total_norm(tensors)
    assert norm.shape == () and norm.dtype == (FP64 if FP64 in dtypes else FP32)
    torch.testing.assert_close(norm.double(), expected, rtol=3e-7, atol=0)


def test_the_norm_by_hand() -> None:
    assert float(total_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]).bfloat16()])) == 5.0
    assert float(total_norm([torch.zeros(0), torch.zeros(3, 0)])) == 0.0
    columns = torch.tensor([[3.0, 100.0], [4.0, 100.0]])[:, :1]
    assert float(total_norm([columns])) == 5.0  # of what the strides leave


def test_the_norm_of_millions_is_as_precise() -> None:
    x = torch.rand(3_000_001, generator=torch.Generator().manual_seed(2)) + 1.0
    torch.testing.assert_close(total_norm([x]).double(), x.double().norm(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64, FP16])
def test_the_norm_of_no_numbers(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(5000, dtype=dtype)
    x[-1] = bad
    norm = float(total_norm([torch.ones(3), x]))
    assert math.isnan(norm) if math.isnan(bad) else norm == bad
