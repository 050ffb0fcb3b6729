"""attention against softmax(q k^T) v, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.ops import attention

from ._masks import attention_masks, drop, seed_tensor
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

on_every_target = pytest.mark.parametrize("target", targets("attention"), indirect=True)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("attention"), indirect=True
)
Lengths = tuple[int, ...]
SEED, OFFSET = -(2**50) - 3, 3

# Lengths, heads, head_dim. 32, 64 and 128 have kernels of their own, others a general one.
CASES: list[tuple[Lengths, int, int]] = [
    ((), 2, 64),
    ((0,), 2, 64),
    ((0, 0, 0), 1, 32),
    ((1,), 12, 64),
    ((1, 1, 0, 1), 2, 32),
    ((63,), 2, 64),
    ((64,), 2, 32),
    ((65,), 1, 128),
    ((127,), 3, 64),
    ((0, 1, 63, 0, 64, 65, 2, 127, 0), 2, 64),
    ((5, 17, 40), 2, 32),
    ((33, 0, 70), 2, 128),
    ((3, 29, 1, 32), 2, 24),
    ((66, 9), 1, 80),
    ((20, 13), 2, 1),
    ((16, 48), 1, 256),
    ((1000,), 1, 64),
    ((127, 384, 0, 128, 360, 1), 1, 64),
]


def offsets(lengths: Lengths, device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def ours(lengths: Lengths, device: str, p: float = 0.0, **options: float) -> Function:
    cu_seqlens, seed = offsets(lengths, device), seed_tensor(SEED, device)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attention(
            torch.stack((q, k, v), 1), cu_seqlens, max(lengths, default=0),
            dropout_p=p, dropout_seed=seed, dropout_offset=OFFSET, **options,
        )  # fmt: skip

    return call


def plain(
    lengths: Lengths, device: str, p: float = 0.0, softmax_scale: float | None = None
) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
        masks = attention_masks(lengths, q.shape[1], p, SEED, OFFSET, device)
        outs, lses = [q[:0] + k[:0] + v[:0]], [q.new_zeros(q.shape[1], 0, dtype=statistic)]
        sequences = zip(*(x.split(lengths) for x in (q, k, v)), masks, strict=True)
        for qs, ks, vs, mask in sequences:
            scores = torch.einsum("ind,jnd->nij", qs, ks) * scale
            outs.append(torch.einsum("nij,jnd->ind", drop(scores.softmax(-1), mask, p), vs))
            lses.append(scores.to(statistic).logsumexp(-1) if len(qs) else lses[0])
        return torch.cat(outs), torch.cat(lses, 1)

    return call


def example(draw: Draw, tokens: int, heads: int, dim: int) -> Inputs:
    return {name: draw(tokens, heads, dim) for name in "qkv"}


@on_every_target
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "p"),
    [(*case, 0.0) for case in CASES]
    # A million words would take the reference's Philox seconds, and test nothing more.
    + [(*case, 0.2) for case in CASES if max(case[0], default=0) < 1000],
    ids=str,
)
def test_parity(target: Target, lengths: Lengths, heads: int, dim: int, p: float) -> None:
    draw, tokens = Draw(target), sum(lengths)
    inputs, grad = example(draw, tokens, heads, dim), draw(tokens, heads, dim)
    functions = ours(lengths, target.device, p), plain(lengths, target.device, p)
    if max(lengths, default=0) > 1:
        check_parity(*functions, inputs, grad)
    else:
        # The softmax of one score is constant: dq and dk are 0, the difference of two equal sums.
        # What rounding leaves of that is small beside those sums, which is to say beside dv.
        as_one = [lambda qkv, call=call: call(*qkv.unbind(1)) for call in functions]
        check_parity(*as_one, {"qkv": torch.stack(tuple(inputs.values()), 1)}, grad)


@pytest.mark.parametrize("target", targets("attention"), indirect=True)
@pytest.mark.parametrize(("lengths", "heads", "dim"), CASES, ids=str)
def test_parity_of_inference(target: Target, lengths: Lengths, heads: int, dim: int) -> None:
    inputs = example(Draw(target), sum(lengths), heads, dim)
    wide = {name: x.double() for name, x in inputs.items()}
    with torch.inference_mode():
        results, torchs, oracles = (
            dict(zip(("out", "lse"), function(**tensors), strict=True))
            for function, tensors in (
                (ours(lengths, target.device), inputs),
                (plain(lengths, target.device), inputs),
                (plain(lengths, target.device), wide),
            )
        )
    check_results(results, torchs, oracles, target.dtype)


@on_every_target
def test_extreme_magnitudes(target: Target) -> None:
    """Tokens from 1e-3 to 30: uniform and saturated rows side by side, exp() far out of range."""
    lengths, draw = (64, 1, 40), Draw(target)
    inputs, grad = example(draw, 105, 2, 64), draw(105, 2, 64)
    largest = 1.0 if target.dtype == torch.float16 else 1.5  # torch's own scores must be finite
    sizes = torch.logspace(-3, largest, 105, dtype=torch.float64).to(inputs["q"])[:, None, None]
    inputs |= {"q": inputs["q"] * sizes, "k": inputs["k"] * sizes.flip(0)}
    check_parity(ours(lengths, target.device), plain(lengths, target.device), inputs, grad)


@on_every_target
def test_softmax_scale(target: Target) -> None:
    lengths, draw = (30, 11), Draw(target)
    inputs, grad = example(draw, 41, 2, 32), draw(41, 2, 32)
    check_parity(
        ours(lengths, target.device, softmax_scale=0.7),
        plain(lengths, target.device, softmax_scale=0.7),
        inputs,
        grad,
    )


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_each_gradient_alone_and_same_bits_twice(target: Target, p: float) -> None:
    lengths, draw = (70, 0, 31), Draw(target)
    inputs, grad = example(draw, 101, 2, 64), draw(101, 2, 64)
    call = ours(lengths, target.device, p)
    check_each_gradient_alone(call, inputs, grad)
    check_same_bits(run(call, inputs, grad), run(call, inputs, grad))


@on_every_target
def test_max_seqlen_is_a_bound_not_a_length(target: Target) -> None:
    draw = Draw(target)
    qkv, cu_seqlens = draw(48, 3, 2, 64), offsets((17, 31), target.device)
    results = [attention(qkv, cu_seqlens, most) for most in (31, 512)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@on_every_target
def test_strided_qkv(target: Target) -> None:
    """As a Linear with (N, 3, D) columns would make it, and a gradient as ``sum()`` would."""
    draw = Draw(target)
    qkv = draw(48, 2, 3, 64).transpose(1, 2)
    cu_seqlens, grad = offsets((17, 31), target.device), draw(1, 1, 64).expand(48, 2, 64)

    def call(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attention(qkv, cu_seqlens, 31)

    dense = run(call, {"qkv": qkv.contiguous()}, grad.contiguous())
    check_same_bits(run(call, {"qkv": qkv}, grad), dense)
    spread = torch.stack((cu_seqlens, cu_seqlens), 1)[:, 0]
    assert torch.equal(attention(qkv, spread, 31)[0], dense["out"])


@on_every_target
def test_lse_carries_no_gradient(target: Target) -> None:
    qkv = Draw(target)(9, 3, 2, 32).requires_grad_()
    out, lse = attention(qkv, offsets((4, 5), target.device), 5)
    assert out.requires_grad and not lse.requires_grad
    assert lse.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    with torch.inference_mode():
        assert torch.equal(attention(qkv, offsets((4, 5), target.device), 5)[0], out)


@on_every_target
def test_neighbours_with_nan_do_not_leak(target: Target) -> None:
    lengths, draw = (20, 33, 12), Draw(target)
    inputs, grad = example(draw, 65, 2, 64), draw(65, 2, 64)
    clean = run(ours(lengths, target.device), inputs, grad)
    for name in "qkv":
        inputs[name][20:53] = float("nan")
    broken = run(ours(lengths, target.device), inputs, grad)
    rest = [*range(20), *range(53, 65)]
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(broken[name][rest], clean[name][rest]), name


@on_cpu_backends
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(3, 0, 1, 2), (4,)], ids=str)
def test_gradcheck(cpu_backend: str, lengths: Lengths, p: float) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    tokens = sum(lengths)
    inputs = [x.requires_grad_() for x in example(draw, tokens, 2, 3).values()]
    call = ours(lengths, "cpu", p)
    assert torch.autograd.gradcheck(lambda *tensors: call(*tensors)[0], inputs)


@on_cpu_backends
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    dim=st.sampled_from([8, 32, 64, 80]),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_only_its_own_sequence_matters(cpu_backend, lengths, order, dim, seed) -> None:
    """Permuted sequences give permuted results, and each is what it is when alone.

    Bit for bit, except that torch's products (the reference) may take another path for another
    address or shape.
    """
    draw = Draw(Target(cpu_backend, "cpu", torch.float32, torch.float32), seed)
    sequences = [draw(length, 3, 2, dim) for length in lengths]
    grads = [draw(length, 2, dim) for length in lengths]

    def results(batch: list[int]) -> list[dict[str, torch.Tensor]]:
        cu_seqlens = offsets(tuple(lengths[b] for b in batch), "cpu")
        together = run(
            lambda qkv: attention(qkv, cu_seqlens, max(lengths[b] for b in batch)),
            {"qkv": torch.cat([sequences[b] for b in batch])},
            torch.cat([grads[b] for b in batch]),
        )
        sizes = [lengths[b] for b in batch]
        return [
            {"out": out, "lse": lse, "dqkv": dqkv}
            for out, lse, dqkv in zip(
                together["out"].split(sizes),
                together["out1"].split(sizes, 1),
                together["dqkv"].split(sizes),
                strict=True,
            )
        ]

    batch = list(range(len(lengths)))
    in_order = results(batch)
    order.shuffle(batch)
    for position, b in zip(results(batch), batch, strict=True):
        for other in (position, results([b])[0]):
            if cpu_backend == "reference":
                for name, x in in_order[b].items():
                    torch.testing.assert_close(other[name], x)
            else:
                check_same_bits(other, in_order[b])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qkv", {"qkv": torch.ones(6, 3, 8)}),
        ("qkv", {"qkv": torch.ones(6, 2, 2, 8)}),
        ("qkv", {"qkv": torch.ones(6, 3, 2, 8, dtype=torch.int32)}),
        ("qkv", {"qkv": None}),
        ("cu_seqlens", {"cu_seqlens": [0, 2, 6]}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 6])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 2, 6]], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.empty(0, dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 2, 6], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 7], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, -1, 6], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}),
        ("max_seqlen", {"max_seqlen": 3}),
        ("max_seqlen", {"max_seqlen": -1}),
        ("max_seqlen", {"max_seqlen": 4.0}),
        ("max_seqlen", {"max_seqlen": torch.tensor(4)}),
        ("dropout_p", {"dropout_p": 1.0}),
        ("dropout_p", {"dropout_p": -1e-9}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": None}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "qkv": torch.ones(6, 3, 2, 8),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        "max_seqlen": 4,
        "dropout_seed": seed_tensor(1),
    }
    with pytest.raises(ValueError, match=rf"^{name}: .*"):
        attention(**(good | arguments))
