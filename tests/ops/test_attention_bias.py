"""attention with an additive bias: the equation, the masks made of it, and who takes it."""

from __future__ import annotations

import logging

import pytest
import torch

from fastbert import _native, device
from fastbert.ops import OPS, BackendError, _registry, attention, choices, use_backend

from ._masks import attention_masks, drop, seed_tensor
from ._parity import Function, Inputs, check_parity, check_same_bits, run
from ._targets import Draw, Target, targets

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = [name for name in OPS["attention"].modules if name not in OPS["attention"].no_bias]
on_every_target = pytest.mark.parametrize(
    "target", [t for t in targets("attention") if t.values[0].backend in BACKENDS], indirect=True
)
Lengths = tuple[int, ...]
SEED, OFFSET = 2**40 + 9, 6
NEVER = -torch.inf
FLOAT64 = Target("reference", "cpu", torch.float64, torch.float64)


def offsets(lengths: Lengths, device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def example(draw: Draw, tokens: int, heads: int, dim: int) -> Inputs:
    return {name: draw(tokens, heads, dim) for name in "qkv"}


def random_bias(draw: Draw, lengths: Lengths, heads: int, width: int) -> torch.Tensor:
    """Normal numbers, a third of them -inf, some rows all -inf; nan past each sequence's end."""
    bias = draw(heads, sum(lengths), width)
    bias[draw(*bias.shape) > 0.4] = NEVER
    bias[:, 1::5] = NEVER
    bias[0, ::7] = NEVER
    for part, length in zip(bias.split(lengths, 1), lengths, strict=True):
        part[..., length:] = torch.nan
    return bias


def ours(lengths: Lengths, bias: torch.Tensor | None, p: float = 0.0) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        where = str(q.device)
        return attention(
            torch.stack((q, k, v), 1), offsets(lengths, where), max(lengths, default=0), bias=bias,
            dropout_p=p, dropout_seed=seed_tensor(SEED, where), dropout_offset=OFFSET,
        )  # fmt: skip

    return call


def plain(lengths: Lengths, bias: torch.Tensor, p: float = 0.0) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
        masks = attention_masks(lengths, q.shape[1], p, SEED, OFFSET, str(q.device))
        sequences = (x.split(lengths) for x in (q, k, v))
        parts = zip(*sequences, bias.split(lengths, 1), masks, strict=True)
        outs, lses = [q[:0] + k[:0] + v[:0]], [q.new_zeros(q.shape[1], 0, dtype=statistic)]
        for qs, ks, vs, b, mask in parts:
            scores = torch.einsum("ind,jnd->nij", qs, ks) * q.shape[2] ** -0.5
            scores = scores + b[..., : len(qs)].to(scores.dtype)
            blind = (scores == NEVER).all(-1, keepdim=True)
            weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
            outs.append(torch.einsum("nij,jnd->ind", drop(weights, mask, p), vs))
            lses.append(scores.to(statistic).logsumexp(-1) if len(qs) else lses[0])
        return torch.cat(outs), torch.cat(lses, 1).masked_fill(torch.cat(lses, 1) == NEVER, -1e3)

    return call


def finite_lse(function: Function) -> Function:
    """The criterion wants finite numbers: -1000 stands for the -inf of a query that sees no key."""

    def call(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = function(**inputs)
        return out, lse.masked_fill(lse == NEVER, -1e3)

    return call


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("lengths", "dim", "width"),
    [((1,), 32, 1), ((5, 0, 33), 32, 40), ((64, 70), 64, 70), ((9, 130), 24, 137)],
    ids=str,
)
def test_parity(
    target: Target, lengths: Lengths, dim: int, width: int, heads: int, p: float
) -> None:
    """``heads`` biases for three heads: one for all of them, or one each."""
    draw, tokens = Draw(target), sum(lengths)
    inputs, grad = example(draw, tokens, 3, dim), draw(tokens, 3, dim)
    bias = random_bias(draw, lengths, heads, width)
    check_parity(finite_lse(ours(lengths, bias, p)), plain(lengths, bias, p), inputs, grad)


@on_every_target
def test_extreme_biases(target: Target) -> None:
    """Biases far beyond the scores choose the key; all equal, they change nothing."""
    lengths, draw = (40, 66), Draw(target)
    qkv, grad = draw(106, 3, 2, 32), draw(106, 2, 32)
    bias = draw(2, 106, 66, scale=3000.0)
    # As one input: beside dv, dq and dk of a softmax that chose are what rounding leaves of 0.
    functions = ours(lengths, bias), plain(lengths, bias)
    as_one = [lambda qkv, call=call: call(*qkv.unbind(1)) for call in functions]
    check_parity(*as_one, {"qkv": qkv}, grad)
    level = ours(lengths, torch.full_like(bias, -64.0))(*qkv.unbind(1))[0]
    torch.testing.assert_close(level, ours(lengths, None)(*qkv.unbind(1))[0], rtol=1e-5, atol=1e-2)


@on_every_target
def test_a_query_that_sees_no_key(target: Target) -> None:
    """Its output and gradients are exactly 0, and the others' are as if it were not there."""
    draw = Draw(target)
    inputs, grad = example(draw, 20, 2, 32), draw(20, 2, 32)
    bias = draw(1, 20, 20)
    bias[:, 3] = bias[:, 11] = NEVER
    together = run(ours((20,), bias), inputs, grad)
    for row in (3, 11):
        assert (together["out"][row] == 0).all() and (together["dq"][row] == 0).all()
        assert (together["out1"][:, row] == NEVER).all()
    quiet = grad.clone()
    quiet[[3, 11]] = 0.0
    check_same_bits(run(ours((20,), bias), inputs, quiet), together)
    all_blind = run(ours((20,), torch.full_like(bias, NEVER)), inputs, grad)
    assert all((all_blind[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


@on_every_target
def test_causal_attention_sees_the_prefix(target: Target) -> None:
    """Row i under a causal bias is the last row of the first i + 1 tokens' attention."""
    draw = Draw(target)
    qkv = draw(11, 3, 2, 32)
    causal = torch.full((11, 11), NEVER, device=target.device).triu(1)
    out, lse = attention(qkv, offsets((11,), target.device), 11, bias=causal[None])
    for i in range(11):
        prefix = attention(qkv[: i + 1], offsets((i + 1,), target.device), i + 1)
        torch.testing.assert_close(out[i], prefix[0][i], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse[:, i], prefix[1][:, i], rtol=1e-5, atol=1e-5)


@on_every_target
def test_blocks_are_sequences(target: Target) -> None:
    """A bias that keeps two parts of a sequence apart makes two sequences of it."""
    draw = Draw(target)
    inputs, grad = example(draw, 50, 2, 32), draw(50, 2, 32)
    part = torch.arange(50, device=target.device) < 18
    bias = torch.zeros(50, 50, device=target.device).masked_fill(part[:, None] != part, NEVER)
    blocks = run(ours((50,), bias[None]), inputs, grad)
    for name, x in run(ours((18, 32), None), inputs, grad).items():
        torch.testing.assert_close(blocks[name], x, rtol=1e-2, atol=1e-2)


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_strides_of_the_bias(target: Target, dtype: torch.dtype) -> None:
    """Numbers that every dtype holds give the same bits in each, and from any strides."""
    draw = Draw(target)
    inputs, grad = example(draw, 30, 2, 32), draw(30, 2, 32)
    bias = draw.ids(5, 2 * 30 * 30).view(2, 30, 30).to(target.dtype)
    dense = run(ours((30,), bias), inputs, grad)
    check_same_bits(run(ours((30,), bias.to(dtype)), inputs, grad), dense)
    check_same_bits(run(ours((30,), bias.mT.contiguous().mT), inputs, grad), dense)
    shared = bias[:1].expand(2, 30, 30)
    check_same_bits(
        run(ours((30,), shared), inputs, grad), run(ours((30,), bias[:1]), inputs, grad)
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(heads: int, p: float) -> None:
    draw, lengths = Draw(FLOAT64), (3, 0, 4)
    inputs = [x.requires_grad_() for x in example(draw, 7, 2, 3).values()]
    bias = random_bias(draw, lengths, heads, 5)
    with use_backend("reference"):
        call = ours(lengths, bias, p)
        assert torch.autograd.gradcheck(lambda *tensors: call(*tensors)[0], inputs)


def test_one_graph_equals_eager() -> None:
    draw, lengths = Draw(FLOAT64), (20, 0, 33)
    inputs, grad = example(draw, 53, 2, 24), draw(53, 2, 24)
    bias = random_bias(draw, lengths, 2, 40)
    torch.compiler.reset()
    compiled = torch.compile(ours(lengths, bias, 0.1), backend="aot_eager", fullgraph=True)
    check_same_bits(run(compiled, inputs, grad), run(ours(lengths, bias, 0.1), inputs, grad))
    torch.compiler.reset()


# ------------------------------------------------------------------------------- who takes it


QKV, CU_SEQLENS = torch.ones(6, 3, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """As where no Triton interpreter runs, with nothing chosen yet."""
    monkeypatch.setattr(device, "triton_interpreted", lambda: False)
    _registry.forget_choices()
    with use_backend(None, strict=False):
        yield
    _registry.forget_choices()


def test_automatic_choice_passes_over_kernels_without_bias(
    on_cpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    bias = torch.zeros(1, 6, 4)
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        biased = attention(QKV, CU_SEQLENS, 4, bias=bias)[0]
    torch.testing.assert_close(biased, attention(QKV, CU_SEQLENS, 4)[0])
    assert "cpp kernel of attention takes no bias" in caplog.text
    (row,) = [r for r in choices("cpu", torch.float32, {}, bias=True) if r["op"] == "attention"]
    assert row["backend"] == "reference"
    assert row["passed_over"]["cpp"] == "the cpp kernel of attention takes no bias"


def test_force_and_strict_mode_say_why(on_cpu: None) -> None:
    bias = torch.zeros(1, 6, 4)
    with use_backend(strict=True), pytest.raises(BackendError, match="strict.*takes no bias"):
        attention(QKV, CU_SEQLENS, 4, bias=bias)
    if _native.cpu_reason() is None:
        with use_backend("cpp"), pytest.raises(BackendError, match="'cpp' is forced.*no bias"):
            attention(QKV, CU_SEQLENS, 4, bias=bias)
    for backend in OPS["attention"].no_bias:
        call = (OPS["attention"], backend, "cpu", torch.float32, 8)
        assert "takes no bias" in str(_registry.refusal(*call, bias=True))
        assert "takes no bias" not in str(_registry.refusal(*call, bias=False))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(6, 4), r"got float32 \(6, 4\) on cpu, expected shape \(N, 6, S\)"),
        (torch.zeros(1, 5, 4), r"expected shape \(N, 6, S\)"),
        (torch.zeros(1, 6, 3), r"expected \(1 or 2, 6, at least 4\)"),
        (torch.zeros(3, 6, 4), r"expected \(1 or 2, 6, at least 4\)"),
        (torch.zeros(1, 6, 4, dtype=torch.bool), "expected a floating-point tensor"),
        (torch.zeros(1, 6, 4, device="meta"), "on cpu"),
        (torch.zeros(1, 6, 4, requires_grad=True), "expected a constant"),
    ],
)
def test_bad_bias(bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^bias: .*{message}"):
        attention(QKV, CU_SEQLENS, 4, bias=bias)
