"""The launchers of the cuda backend on a real GPU, against the formulas in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch

from .cuda_emulator import checks, formulas

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
DROPOUT = pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p.1"])
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 512, 0, 300]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def launch() -> ModuleType:
    from fastbert import _native

    if _native.cuda_reason() is not None:
        pytest.skip(str(_native.cuda_reason()))
    from fastbert.ops import _cuda_launch

    return _cuda_launch


@pytest.fixture
def mma_alone() -> Callable[[], AbstractContextManager[None]]:
    """A context in which attention multiplies with mma.sync, on Hopper too."""
    from fastbert import _native

    native = _native.cuda()
    if not native.has_wgmma():
        pytest.skip("there is one instruction where there is no wgmma")

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        assert native.allow_wgmma(False)
        try:
            yield
        finally:
            native.allow_wgmma(True)

    return context


def place(x: torch.Tensor) -> torch.Tensor:
    return x.cuda()


@DROPOUT
@DTYPES
@pytest.mark.parametrize("head_dim", [20, 32, 64, 128])
def test_attention(launch: ModuleType, head_dim: int, dtype: torch.dtype, p: float) -> None:
    checks.attention(launch, place, LENGTHS, 12, head_dim, dtype, p=p, slack=5)


@DROPOUT
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_by_both_instructions(
    launch: ModuleType, mma_alone: Callable[[], AbstractContextManager[None]], head_dim: int,
    dtype: torch.dtype, p: float,
) -> None:  # fmt: skip
    """On Hopper wgmma and, where that is not allowed, mma.sync: both right and close."""
    results = []
    for context in (contextlib.nullcontext, mma_alone):
        with context():
            results.append(checks.attention(launch, place, LENGTHS, 12, head_dim, dtype, p=p))
    (out, lse), (other, other_lse) = results
    checks.assert_close("out", out, other, torch.finfo(dtype).eps)
    checks.assert_close("lse", lse, other_lse)


def test_both_instructions_give_the_same_bits_a_hundred_times(
    launch: ModuleType, mma_alone: Callable[[], AbstractContextManager[None]]
) -> None:
    """Lengths that leave warpgroups idle, tiles ragged and stages refilled while others read."""
    lengths = [512, 1, 65, 448, 130, 0, 300] * 16
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    seed = torch.tensor([5], device="cuda")
    for head_dim in (64, 128):
        qkv = torch.randn(sum(lengths), 3, 12, head_dim, device="cuda", dtype=BF16)
        for context in (contextlib.nullcontext, mma_alone):
            with context():
                first = launch.attention_fwd(qkv, bounds, 512, 0.125, 0.1, seed, 1)
                for _ in range(100):
                    again = launch.attention_fwd(qkv, bounds, 512, 0.125, 0.1, seed, 1)
                    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@DROPOUT
@DTYPES
@pytest.mark.parametrize("head_dim", [20, 32, 64, 128])
@pytest.mark.parametrize("longest", [64, 128, 129, 256, 300, 512, 513, 1100])
def test_attention_bwd(
    launch: ModuleType, longest: int, head_dim: int, dtype: torch.dtype, p: float
) -> None:
    """Each way to take a (sequence, head): in one key tile, in several, in two kernels, plainly."""
    lengths = [n for n in LENGTHS if n < longest]
    checks.attention_bwd(launch, place, [*lengths, longest], 3, head_dim, dtype, p=p)


@pytest.mark.parametrize("lengths", [[], [0], [1], [1] * 70_000], ids=["none", "0", "1", "many"])
def test_attention_over_unusual_batches(launch: ModuleType, lengths: list[int]) -> None:
    checks.attention(launch, place, lengths, 1, 64, BF16, p=0.1)
    checks.attention_bwd(launch, place, lengths, 1, 64, BF16, p=0.1)


@pytest.mark.parametrize("scale", [0.0, 1e-60, -0.2, 3.0], ids=str)
def test_attention_takes_any_scale(launch: ModuleType, scale: float) -> None:
    checks.attention(launch, place, [5, 40], 1, 32, FP16, scale=scale)
    checks.attention_bwd(launch, place, [5, 40], 1, 32, FP16, scale=scale)


def test_attention_past_32_bit_offsets(launch: ModuleType) -> None:
    heads, head_dim, length = 12, 64, 96
    tokens = 2**31 // (3 * heads * head_dim) + 4 * length
    generator = torch.Generator().manual_seed(1)
    last = torch.randn(length, 3, heads, head_dim, generator=generator).bfloat16()
    qkv = torch.zeros(tokens, 3, heads, head_dim, dtype=BF16, device="cuda")
    qkv[-length:] = last.cuda()
    bounds = torch.tensor([0, *range(tokens % length, tokens + 1, length)], dtype=torch.int32)
    out, lse = launch.attention_fwd(qkv, bounds.cuda(), length, 0.125, 0.0, None, 0)
    want, want_lse = formulas.attention(last, [0, length], 0.125, 0.0, 0, 0)
    checks.assert_close("out", out[-length:], want, torch.finfo(BF16).eps)
    checks.assert_close("lse", lse[:, -length:], want_lse)
    assert not out[:-length].any()


@pytest.mark.parametrize("max_seqlen", [96, 600], ids=["one block", "two kernels"])
def test_attention_bwd_past_32_bit_offsets(launch: ModuleType, max_seqlen: int) -> None:
    heads, head_dim, length = 12, 64, 96
    tokens = 2**31 // (3 * heads * head_dim) + 4 * length
    generator = torch.Generator().manual_seed(1)
    last = torch.randn(length, 3, heads, head_dim, generator=generator).bfloat16()
    last_dout = torch.randn(length, heads, head_dim, generator=generator).bfloat16()
    qkv = torch.zeros(tokens, 3, heads, head_dim, dtype=BF16, device="cuda")
    dout = torch.zeros(tokens, heads, head_dim, dtype=BF16, device="cuda")
    qkv[-length:], dout[-length:] = last.cuda(), last_dout.cuda()
    bounds = torch.tensor([0, *range(tokens % length, tokens + 1, length)], dtype=torch.int32)
    out, lse = launch.attention_fwd(qkv, bounds.cuda(), length, 0.125, 0.0, None, 0)
    dqkv = launch.attention_bwd(dout, qkv, out, lse, bounds.cuda(), max_seqlen, 0.125, 0.0, None, 0)
    want = formulas.attention_bwd(last_dout, last, out[-length:], [0, length], 0.125, 0.0, 0, 0)
    checks.assert_close("dqkv", dqkv[-length:], want, torch.finfo(BF16).eps)
    assert not dqkv[:-length].any()


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@DTYPES
@pytest.mark.parametrize("shape", [(0, 64), (1, 96), (1000, 1000), (4099, 3072), (65, 13)], ids=str)
def test_bias_gelu(
    launch: ModuleType, shape: tuple[int, int], dtype: torch.dtype, tanh: bool
) -> None:
    for vector_dtype in {dtype, FP32, None}:
        checks.bias_gelu(launch, place, *shape, dtype, vector_dtype, tanh)


@DROPOUT
@DTYPES
@pytest.mark.parametrize("cols", [13, 64, 96, 384, 768, 1000, 1024, 2048])
@pytest.mark.parametrize("rows", [0, 1, 1027])
def test_add_layer_norm(
    launch: ModuleType, rows: int, cols: int, dtype: torch.dtype, p: float
) -> None:
    checks.add_layer_norm(launch, place, rows, cols, dtype, dtype, p=p)


@DROPOUT
@DTYPES
@pytest.mark.parametrize("cols", [13, 64, 96, 384, 768, 1000, 1024, 2048])
@pytest.mark.parametrize("rows", [0, 1, 65, 1027])
def test_embed_layer_norm(
    launch: ModuleType, rows: int, cols: int, dtype: torch.dtype, p: float
) -> None:
    checks.embed_layer_norm(launch, place, rows, cols, dtype, dtype, p=p)


@pytest.mark.parametrize("ids", ["random", "same", "outside"])
@pytest.mark.parametrize(
    "entries", [(97, 33, 2), (97, 33, 0), (30_522, 512, 2), (250_002, 514, 1)], ids=str
)
def test_embed_layer_norm_of_other_tables(
    launch: ModuleType, entries: tuple[int, int, int], ids: str
) -> None:
    checks.embed_layer_norm(launch, place, 9000, 96, BF16, FP32, p=0.1, entries=entries, ids=ids)


def test_add_layer_norm_off_16_byte_boundaries(launch: ModuleType) -> None:
    def misaligned(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)

    checks.add_layer_norm(launch, misaligned, 6, 96, BF16, BF16, p=0.3)
    checks.embed_layer_norm(launch, misaligned, 300, 96, BF16, BF16, p=0.3)
    checks.bias_gelu(launch, misaligned, 6, 96, BF16, BF16, False)
    checks.attention(launch, misaligned, [3, 40], 1, 32, BF16)
    checks.attention_bwd(launch, misaligned, [3, 40], 1, 32, BF16)


def test_the_same_bits_a_hundred_times(launch: ModuleType) -> None:
    """A race would show as a difference now and then."""
    rows, cols = 8192, 768
    x, residual, dy = torch.randn(3, rows, cols, device="cuda", dtype=BF16)
    weight, bias, x_bias = torch.randn(3, cols, device="cuda")
    qkv = torch.randn(rows, 3, 12, 64, device="cuda", dtype=BF16)
    bounds = torch.arange(0, rows + 1, 512, dtype=torch.int32, device="cuda")
    seed = torch.tensor([5], device="cuda")
    word, position, types = (torch.randn(n, cols, device="cuda").to(BF16) for n in (999, 512, 2))
    ids = [torch.randint(n, (rows,), device="cuda") for n in (999, 512, 2)]
    tables = (*ids, word, position, types, weight)

    def run() -> list[torch.Tensor]:
        y, *saved = launch.add_layer_norm_fwd(
            x, residual, x_bias, weight, bias, 1e-5, 0.1, seed, 0, True
        )
        grads = launch.add_layer_norm_bwd(dy, saved[0], weight, *saved[1:], 0.1, seed, 0, True)
        gelu = launch.bias_gelu_bwd(dy, x, bias, False)
        embedded = launch.embed_layer_norm_fwd(*tables, bias, 1e-5, 0.1, seed, 2)
        table_grads = launch.embed_layer_norm_bwd(dy, *tables, *embedded[1:], 0.1, seed, 2)
        out, lse = launch.attention_fwd(qkv, bounds, 512, 0.125, 0.1, seed, 1)
        dqkvs = [  # in one block each, in several key tiles; in two kernels
            launch.attention_bwd(
                dy.view_as(out), qkv, out, lse, bounds, longest, 0.125, 0.1, seed, 1
            )
            for longest in (512, 1024)
        ]
        return [y, *saved, *grads, *gelu, *embedded, *table_grads, out, lse, *dqkvs]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_a_captured_graph_draws_fresh_masks(launch: ModuleType) -> None:
    x = torch.randn(64, 768, device="cuda", dtype=BF16)
    ones = torch.ones(768, device="cuda", dtype=BF16)
    seed = torch.tensor([1], device="cuda")

    def run() -> torch.Tensor:
        return launch.add_layer_norm_fwd(x, None, None, ones, ones, 1e-5, 0.5, seed, 0, False)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(captured, run())


def every_op(
    launch: ModuleType, device: str = "cuda"
) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Inputs, at least one of every launcher, and a call of all launchers on them."""
    rows, cols, entries = 640, 96, (997, 512, 2)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, BF16)

    x, residual, dy = (randn(rows, cols) for _ in range(3))
    weight, bias, x_bias = (randn(cols) for _ in range(3))
    tables = [randn(n, cols) for n in entries]
    ids = [torch.randint(n, (rows,), generator=generator).to(device) for n in entries]
    qkv = randn(rows, 3, 2, 48), randn(rows, 3, 3, 32)
    bounds = torch.arange(0, rows + 1, 128, dtype=torch.int32, device=device)
    seed = torch.tensor([5], device=device)

    def run() -> list[torch.Tensor]:
        y, *saved = launch.add_layer_norm_fwd(
            x, residual, x_bias, weight, bias, 1e-5, 0.1, seed, 0, True
        )
        lookup = (*ids, *tables, weight)
        embedded = launch.embed_layer_norm_fwd(*lookup, bias, 1e-5, 0.1, seed, 2)
        return [
            y,
            *launch.add_layer_norm_bwd(dy, saved[0], weight, *saved[1:], 0.1, seed, 0, True),
            *embedded,
            *launch.embed_layer_norm_bwd(dy, *lookup, *embedded[1:], 0.1, seed, 2),
            launch.bias_gelu_fwd(x, bias, False),
            *launch.bias_gelu_bwd(dy, x, bias, False),
            *(out for h in qkv for out in launch.attention_fwd(h, bounds, 128, 0.1, 0.1, seed, 1)),
        ]

    return [x, residual, dy, *tables, *qkv], run


def test_every_op_in_a_captured_graph(launch: ModuleType) -> None:
    """A launch that waited, or allocated past torch's pool, would end the capture."""
    _, run = every_op(launch)
    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_every_op_on_a_stream_of_its_own(launch: ModuleType) -> None:
    """The inputs change on that stream, late: a launch on another would read the former ones."""
    inputs, run = every_op(launch)
    run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for tensor in inputs:
            tensor.mul_(0.5)
        got = run()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_op_on_a_device_that_is_not_the_current_one(launch: ModuleType) -> None:
    want, got = every_op(launch)[1](), every_op(launch, "cuda:1")[1]()
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_a_refused_call_leaves_no_error_behind(launch: ModuleType) -> None:
    wide = torch.zeros(1, 3, 1, 10_000, device="cuda")
    bounds = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="head dimension 10000 is too large"):
        launch.attention_fwd(wide, bounds, 1, 1.0, 0.0, None, 0)
    assert all(torch.isfinite(out).all() for out in every_op(launch)[1]())


def test_embed_layer_norm_past_32_bit_offsets(launch: ModuleType) -> None:
    cols, last = 1024, 40
    tokens = 2**31 // cols + last
    ids = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    ids[-last:] = torch.arange(1, last + 1)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(last + 1, cols, generator=generator)
    ones, zeros = torch.ones(cols), torch.zeros(cols)
    tables = (ids, ids, None, *(table.to("cuda", BF16),) * 2, None, ones.to("cuda", BF16))
    y, mean, rstd = launch.embed_layer_norm_fwd(*tables, zeros.to("cuda", BF16), 1e-5, 0.0, None, 0)
    dy = torch.zeros_like(y)
    dy[-last:] = torch.randn(last, cols, generator=generator).to("cuda", BF16)
    dword, dposition, *_ = launch.embed_layer_norm_bwd(dy, *tables, mean, rstd, 0.0, None, 0)

    e = 2 * table.bfloat16()[1:].double()
    want, want_mean, _ = formulas.layer_norm(e, ones.double(), zeros.double(), 1e-5)
    checks.assert_close("y", y[-last:], want)
    checks.assert_close("mean", mean[-last:], want_mean)
    want_de, *_ = formulas.layer_norm_bwd(dy[-last:].double().cpu(), e, ones.double(), 1e-5)
    checks.assert_close("dword", dword[1:], want_de, torch.finfo(BF16).eps)
    assert not dword[0].any() and torch.equal(dword, dposition)
