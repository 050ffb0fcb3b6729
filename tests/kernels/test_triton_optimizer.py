"""What Triton computes in a step of AdamW or LAMB, over tensors of every size and dtype."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import _optimizer, optimizer
from fastbert.ops import BackendError, use_backend
from fastbert.ops.optimizer import Hyper, Slot, Tables, adamw_step, lamb_step
from fastbert.train import AdamW, Lamb

from ._parity import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    KERNEL_MARKS,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

# Chunks of 64 in blocks of 16: tensors of less than a block, of blocks and a rest, of whole chunks,
# of many.
SIZES = (1, 15, 16, 63, 64, 65, 1000, 0)
KINDS = [(FP32, None), (BF16, None), (FP16, None), (BF16, BF16), (FP16, FP16)]
BETAS, EPS, SCALE = (0.9, 0.999), 1e-6, 3.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (_optimizer, optimizer):
        monkeypatch.setattr(module, "CHUNK", 64)
        monkeypatch.setattr(module, "BLOCK", 16)


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


def slots_of(kinds=KINDS, step=3.0):
    """Slots in the middle of training, with unlike learning rates, decays and numbers of steps."""
    torch.manual_seed(0)
    slots = []
    for grad_dtype, copy_dtype in kinds:
        for i, size in enumerate(SIZES):
            p = random(size)
            slots.append(
                Slot(
                    param=p,
                    grad=random(size, dtype=grad_dtype),
                    exp_avg=random(size, scale=0.1),
                    exp_avg_sq=random(size).square() * 0.01,
                    copy=None if copy_dtype is None else torch.zeros_like(p, dtype=copy_dtype),
                    step=torch.tensor(step + 100 * i, device=DEVICE),
                    lr=torch.tensor(0.01 * (1 + i % 2), device=DEVICE),
                    weight_decay=0.1 if i % 3 else 0.0,
                )
            )
    return slots


def exact(slot, lamb, bias_correction, scale):
    """The new parameter and moments, in fp64."""
    p, g, m, v = (x.double() for x in slot[:4])
    g = g / scale
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    c1 = c2 = 1.0
    if bias_correction:
        c1, c2 = (1 - beta ** float(slot.step) for beta in BETAS)
    u = (m / c1) / ((v / c2).sqrt() + EPS) + slot.weight_decay * p
    trusted = lamb and slot.weight_decay and p.norm() > 0 and u.norm() > 0
    ratio = p.norm() / u.norm() if trusted else 1.0
    return p - slot.lr.double() * ratio * u, m, v


def step(function, slots, bias_correction=True, scale=SCALE, **options):
    scale = None if scale is None else torch.tensor([scale], device=DEVICE)
    with use_backend("triton"):
        function(slots, Hyper(BETAS, EPS, bias_correction), Tables(), scale, **options)


@kernel_test
@pytest.mark.parametrize(("scale", "bias_correction"), [(SCALE, False), (None, True)])
@pytest.mark.parametrize("function", [adamw_step, lamb_step])
def test_a_step(function, scale, bias_correction):
    slots = slots_of()
    expected = [exact(s, function is lamb_step, bias_correction, scale or 1.0) for s in slots]
    grads = [slot.grad.clone() for slot in slots]
    step(function, slots, bias_correction, scale)
    for slot, (p, m, v), grad in zip(slots, expected, grads, strict=True):
        torch.testing.assert_close(slot.exp_avg.double(), m, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(slot.exp_avg_sq.double(), v, rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(slot.param.double(), p, rtol=2e-6, atol=1e-6)
        assert torch.equal(slot.grad, grad)
        if slot.copy is not None:
            eps = torch.finfo(slot.copy.dtype).eps
            torch.testing.assert_close(slot.copy.float(), slot.param, rtol=eps, atol=1e-7)


@kernel_test
@pytest.mark.parametrize("function", [adamw_step, lamb_step])
@pytest.mark.parametrize("number", [1.0, 2.0, 10.0, 200.0, 1e6])
def test_the_bias_correction_is_precise_at_any_step(function, number):
    """1 - beta^step is as small as .001 and as large as 1."""
    slots = slots_of([(FP32, None)], step=number)
    expected = [exact(slot, function is lamb_step, True, 1.0)[0] for slot in slots]
    before = [slot.param.double() for slot in slots]
    step(function, slots, scale=None)
    for slot, p, old in zip(slots, expected, before, strict=True):
        torch.testing.assert_close(slot.param.double() - old, p - old, rtol=1e-5, atol=3e-7)


@kernel_test
@pytest.mark.parametrize("function", [adamw_step, lamb_step])
def test_the_same_inputs_give_the_same_bits(function):
    first = slots_of([(BF16, BF16)])
    step(function, first)
    for _ in range(3):
        again = slots_of([(BF16, BF16)])
        step(function, again)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.param, b.param) and torch.equal(a.copy, b.copy)


@kernel_test
@pytest.mark.parametrize("function", [adamw_step, lamb_step])
def test_neighbours_in_memory_are_left_alone_and_alignment_does_not_matter(function):
    """Tensors cut from one storage at odd places."""
    aligned = slots_of([(FP32, None)])
    storages, shifted = [], []
    for slot in aligned:
        arrays = []
        for x in slot[:4]:
            storage = torch.full((x.numel() + 6,), 7.0, device=DEVICE)
            storage[3:-3] = x
            storages.append(storage)
            arrays.append(storage[3:-3])
        shifted.append(Slot(*arrays, *slot[4:]))
    step(function, aligned)
    step(function, shifted)
    for a, b in zip(aligned, shifted, strict=True):
        assert torch.equal(a.param, b.param) and torch.equal(a.exp_avg_sq, b.exp_avg_sq)
    for storage in storages:
        assert (storage[:3] == 7).all() and (storage[-3:] == 7).all()


@kernel_test
def test_lamb_of_zeros_and_of_nan():
    """No norm, no trust; a norm that is nan is not hidden."""
    zero, normal = torch.zeros(70, device=DEVICE), random(70)
    slots = []
    for p, g in ((zero, normal), (normal, zero), (zero, zero), (normal, zero * math.nan)):
        arrays = p.clone(), g.clone(), zero.clone(), zero.clone()
        one, lr = torch.ones((), device=DEVICE), torch.tensor(0.1, device=DEVICE)
        slots.append(Slot(*arrays, None, one, lr, 0.5 if p is zero else 0.0))
    expected = [exact(slot, True, True, 1.0)[0] for slot in slots]
    step(lamb_step, slots, scale=None)
    for slot, p in zip(slots, expected, strict=True):
        torch.testing.assert_close(slot.param.double(), p, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert slots[3].param.isnan().all()


@kernel_test
def test_lamb_of_shards():
    """Two ranks with half of each tensor, whose squared norms add up: the step of the whole."""
    whole = slots_of([(FP32, None)])
    halves = []
    for part in range(2):
        slots = []
        for slot in copy.deepcopy(whole):
            middle = slot.param.numel() // 2
            cut = slice(None, middle) if part == 0 else slice(middle, None)
            slots.append(Slot(*(x[cut].clone() for x in slot[:4]), *slot[4:]))
        halves.append(slots)
    sums = []
    for slots in copy.deepcopy(halves):  # one after the other: first to hear what each would say
        step(lamb_step, slots, all_reduce=lambda x: sums.append(x.clone()))
    for slots in halves:
        step(lamb_step, slots, all_reduce=lambda x: x.copy_(sums[0] + sums[1]))
    step(lamb_step, whole)
    for slot, first, second in zip(whole, *halves, strict=True):
        joined = torch.cat([first.param, second.param])
        torch.testing.assert_close(joined, slot.param, rtol=1e-6, atol=1e-7)


@kernel_test
def test_the_table_is_made_anew_only_when_a_tensor_moves(monkeypatch):
    made = []
    tabulate = optimizer.tabulate
    monkeypatch.setattr(
        optimizer, "tabulate", lambda slots: made.append(len(slots)) or tabulate(slots)
    )
    slots = slots_of([(FP32, None)])
    tables, hyper = Tables(), Hyper(BETAS, EPS, True)
    with use_backend("triton"):
        for _ in range(3):
            adamw_step(slots, hyper, tables)
        assert len(made) == 1
        slots[0] = slots[0]._replace(grad=slots[0].grad.clone())
        adamw_step(slots, hyper, tables)
        assert len(made) == 2
        adamw_step(slots, Hyper(BETAS, EPS, False), tables)
        adamw_step(slots, hyper, tables)
        assert len(made) == 3


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_the_optimisers_take_the_same_steps_as_with_torch(kind, dtype):
    """Twenty of them, clipped, from zero state, by the classes that users have."""
    finals = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(random(*s, dtype=dtype)) for s in ((9, 11), (70,), (1,))]
        with use_backend(backend):
            opt = kind(params, 0.01, bias_correction=False, max_grad_norm=1.0)
            for _ in range(20):
                for p in params:
                    p.grad = random(*p.shape, dtype=dtype)
                opt.step()
        finals.append([opt.state[p].get("master_param", p).detach() for p in params])
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@kernel_test
def test_what_the_kernels_do_not_take():
    (slot, *_) = slots_of([(FP32, None)])
    double = Slot(*(x.double() for x in slot[:4]), *slot[4:])
    with pytest.raises(BackendError, match="'triton' is forced but cannot serve: it takes fp32"):
        step(adamw_step, [double])
    columns = torch.zeros(4, 4, device=DEVICE).t()
    with pytest.raises(BackendError, match="it takes contiguous tensors"):
        step(adamw_step, [Slot(*[columns[:, :2]] * 4, *slot[4:])])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")
def test_a_graph_recorded_without_a_step_before_is_refused():
    p = torch.nn.Parameter(torch.ones(4, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = Lamb([p], 0.1)
    refused = pytest.raises(RuntimeError, match="take a step before the CUDA graph is recorded")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
