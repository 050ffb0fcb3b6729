"""AdamW and LAMB against their equations, torch's own, and themselves resumed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastbert.train import AdamW, Lamb, clip_grad_norm_

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((7, 5), (5,), (3, 4, 2), ())
OPTIMIZERS = [AdamW, Lamb]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:], "weight_decay": 0.0, "lr_scale": 0.5},
    ]


class Equation:
    """Either optimiser in fp64, written from its paper."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, lamb: bool, bias_correction: bool
    ) -> None:
        self.lr, self.lamb, self.bias_correction = lr, lamb, bias_correction
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.t = 0

    def step(self, grads: list[torch.Tensor]) -> None:
        self.t += 1
        for i, grad in enumerate(grads):
            decay, lr = (0.1, self.lr) if i < 2 else (0.0, self.lr / 2)
            g = grad.double()
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.99 * self.v[i] + 0.01 * g**2
            m, v = self.m[i], self.v[i]
            if self.bias_correction:
                m, v = m / (1 - 0.9**self.t), v / (1 - 0.99**self.t)
            u = m / (v.sqrt() + 1e-6) + decay * self.p[i]
            ratio = 1.0
            if self.lamb and decay:
                ratio = float(self.p[i].norm() / u.norm())
            self.p[i] = self.p[i] - lr * ratio * u


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_equations(kind: Any, bias_correction: bool) -> None:
    params = parameters()
    exact = Equation(params, 0.01, kind is Lamb, bias_correction)
    ours = kind(two_groups(params), 0.01, betas=(0.9, 0.99), bias_correction=bias_correction)
    for step in range(20):
        set_gradients(params, step)
        ours.step()
        exact.step([p.grad for p in params])  # type: ignore[misc]
    for p, expected in zip(params, exact.p, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_strides_do_not_matter(kind: Any, dtype: torch.dtype) -> None:
    """A column, a transposed matrix, a gradient that lies otherwise than its parameter; what lies
    beside the column is left alone."""
    sources = [torch.randn(6, 4).to(dtype) for _ in range(3)]
    beside = sources[0].clone()
    strided = [nn.Parameter(x) for x in (sources[0][:, 1], sources[1].t(), sources[2])]
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in strided]
    a, b = kind(strided, 0.01, weight_decay=0.1), kind(plain, 0.01, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(strided, plain, strict=True):
            q.grad = torch.randn(q.shape).to(dtype)
            p.grad = q.grad.t().contiguous().t()
        a.step()
        b.step()
    for p, q in zip(strided, plain, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    others = [0, 2, 3]
    assert torch.equal(sources[0][:, others], beside[:, others])


def test_adamw_by_hand() -> None:
    """One weight, 2, gradient 0.5: m = .05, v = .00025; both corrected are .5 and .25."""
    p = nn.Parameter(torch.tensor([2.0]))
    p.grad = torch.tensor([0.5])
    AdamW([p], lr=0.1, weight_decay=0.01, eps=0.0).step()
    torch.testing.assert_close(p.data, torch.tensor([2.0 * (1 - 0.001) - 0.1]))

    p = nn.Parameter(torch.tensor([2.0]))
    p.grad = torch.tensor([0.5])
    AdamW([p], lr=0.1, weight_decay=0.01, eps=0.0, bias_correction=False).step()
    direction = 0.05 / math.sqrt(0.00025)  # 3.1623
    torch.testing.assert_close(p.data, torch.tensor([2.0 * (1 - 0.001) - 0.1 * direction]))


def test_lamb_by_hand() -> None:
    """p = (3, 4), |p| = 5; corrected moments give m / sqrt(v) = (1, -1); u = (1.3, -.6)."""
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.2, -7.0])
    Lamb([p], lr=0.1, weight_decay=0.1, eps=0.0).step()
    ratio = 5 / math.sqrt(1.3**2 + 0.6**2)
    expected = torch.tensor([3 - 0.1 * ratio * 1.3, 4 + 0.1 * ratio * 0.6])
    torch.testing.assert_close(p.data, expected)


@pytest.mark.parametrize(("weight", "decay", "grad"), [(0.0, 0.1, 1.0), (3.0, 0.0, 1.0)])
def test_lamb_without_trust(weight: float, decay: float, grad: float) -> None:
    """No norm to speak of, or no decay: the ratio is 1."""
    p = nn.Parameter(torch.tensor([weight]))
    p.grad = torch.tensor([grad])
    Lamb([p], lr=0.1, weight_decay=decay, eps=0.0).step()
    torch.testing.assert_close(p.data, torch.tensor([weight - 0.1]))


def test_lamb_with_no_update_stays() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.zeros(3)
    Lamb([p], lr=0.1).step()
    assert torch.equal(p.data, torch.zeros(3))


def test_adamw_is_torchs() -> None:
    """To the last few ulps over 20 steps, with two groups and a learning rate that moves."""
    mine, theirs = parameters(), parameters()
    ours = AdamW(two_groups(mine), 0.02, betas=(0.9, 0.99), eps=1e-8)
    groups = two_groups(theirs)
    groups[1]["lr"] = 0.01
    peer = torch.optim.AdamW(groups, 0.02, betas=(0.9, 0.99), eps=1e-8, foreach=False)
    for step in range(20):
        for params in (mine, theirs):
            set_gradients(params, step)
        for optimizer in (ours, peer):
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
    for a, b in zip(mine, theirs, strict=True):
        # 4 ulps: the fused kernel rounds its three products in another order.
        torch.testing.assert_close(a, b, rtol=4 * 2.0**-23, atol=2.0**-23)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scale", [100.0, 0.001])
def test_clipping_in_the_step_is_clipping_before_it(kind: Any, scale: float) -> None:
    inside, before = parameters(), parameters()
    a = kind(inside, 0.01, max_grad_norm=1.0)
    b = kind(before, 0.01)
    for step in range(5):
        set_gradients(inside, step, scale)
        set_gradients(before, step, scale)
        exact = torch.cat([p.grad.flatten() for p in before]).double().norm()  # type: ignore[union-attr]
        norm = clip_grad_norm_(before, 1.0)
        a.step()
        b.step()
        assert norm.shape == () and a.grad_norm.shape == ()
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(a.grad_norm, norm)
    for x, y in zip(inside, before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_clip_grad_norm_is_torchs() -> None:
    mine, theirs = parameters(), parameters()
    for scale in (10.0, 0.01):
        set_gradients(mine, 0, scale)
        set_gradients(theirs, 0, scale)
        norm = clip_grad_norm_(mine, 1.0)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.0))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_clipping_by_hand() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0], dtype=torch.float64)
    norm = clip_grad_norm_([p, q, nn.Parameter(torch.zeros(1))], 2.5)
    assert float(norm) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 0.0]))
    exact = torch.tensor([4 * 2.5 / (5 + 1e-6)], dtype=torch.float64)  # by an fp32 factor
    torch.testing.assert_close(q.grad, exact, rtol=2.0**-22, atol=0)
    assert float(clip_grad_norm_([nn.Parameter(torch.zeros(1))], 1.0)) == 0.0


def test_a_nan_gradient_is_not_hidden() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([float("nan"), 1.0])
    optimizer = AdamW([p], 0.1, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.isnan()
    assert p.isnan().any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sixteen_bit_parameters_follow_an_fp32_master(kind: Any) -> None:
    """Updates far below a bf16 ulp add up."""
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    a, b = (kind(params, 1e-5, weight_decay=0.0) for params in (narrow, wide))
    for step in range(10):
        set_gradients(narrow, step)
        for p, q in zip(narrow, wide, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(narrow, wide, strict=True):
        state = a.state[p]
        assert state["exp_avg"].dtype == state["master_param"].dtype == torch.float32
        assert torch.equal(state["master_param"], q)
        assert torch.equal(p, q.to(torch.bfloat16))


def run(
    kind: Any, params: list[nn.Parameter], first: int, last: int, state: Any = None
) -> tuple[Any, list[torch.Tensor]]:
    optimizer = kind(two_groups(params), 0.01, max_grad_norm=1.0)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()
    return optimizer, [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: Any, dtype: torch.dtype) -> None:
    _, expected = run(kind, parameters(dtype), 0, 8)
    params = parameters(dtype)
    optimizer, _ = run(kind, params, 0, 4)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    _, got = run(kind, resumed, 4, 8, state)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    # Loading copied: the state that was given is as it was.
    assert float(state["state"][0]["step"]) == 4


def test_states_go_to_torch_and_back() -> None:
    """Three steps with one, three with the other: the same in either order."""
    finals = []
    for kinds in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        params = parameters()
        first, second = (kind(params, lr=0.01, eps=1e-6, weight_decay=0.01) for kind in kinds)
        for step in range(6):
            if step == 3:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            set_gradients(params, step)
            (first if step < 3 else second).step()
        finals.append(params)
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_state_of_16_bits_from_torch_gets_its_master() -> None:
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=0.01)
    set_gradients(params, 0)
    theirs.step()
    ours = AdamW(params, lr=0.01)
    ours.load_state_dict(theirs.state_dict())
    for p in params:
        state = ours.state[p]
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], theirs.state[p]["exp_avg"].float())
        assert torch.equal(state["master_param"], p.float())
    ours.step()
    assert float(ours.state[params[0]]["step"]) == 2


def test_parameters_without_a_gradient_stay_and_do_not_count_steps() -> None:
    params = parameters()
    optimizer = AdamW(params, 0.1)
    set_gradients(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    assert float(optimizer.state[params[1]]["step"]) == 1
    optimizer.zero_grad()
    assert optimizer.step() is None  # nothing has a gradient


def test_the_closure() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([p], 0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert float(p.detach()) < 2.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": 0.1, "eps": -1e-6}, "eps"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 0.1, "max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bad_arguments(kind: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*expected"):
        kind(parameters(), **arguments)


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="^params: got a parameter of torch.int64"):
        AdamW([nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)], 0.1)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="^params: got a sparse gradient"):
        AdamW(table.parameters(), 0.1).step()
