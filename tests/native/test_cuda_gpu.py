"""The launchers of the cuda backend on a real GPU, against the formulas in fp64."""

from __future__ import annotations

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


def place(x: torch.Tensor) -> torch.Tensor:
    return x.cuda()


@DROPOUT
@DTYPES
@pytest.mark.parametrize("head_dim", [20, 32, 64, 128])
def test_attention(launch: ModuleType, head_dim: int, dtype: torch.dtype, p: float) -> None:
    checks.attention(launch, place, LENGTHS, 12, head_dim, dtype, p=p, slack=5)


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


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
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


def test_add_layer_norm_off_16_byte_boundaries(launch: ModuleType) -> None:
    def misaligned(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)

    checks.add_layer_norm(launch, misaligned, 6, 96, BF16, BF16, p=0.3)
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

    def run() -> list[torch.Tensor]:
        y, *saved = launch.add_layer_norm_fwd(
            x, residual, x_bias, weight, bias, 1e-5, 0.1, seed, 0, True
        )
        grads = launch.add_layer_norm_bwd(dy, saved[0], weight, *saved[1:], 0.1, seed, 0, True)
        gelu = launch.bias_gelu_bwd(dy, x, bias, False)
        out, lse = launch.attention_fwd(qkv, bounds, 512, 0.125, 0.1, seed, 1)
        dqkvs = [  # in one block each, in several key tiles; in two kernels
            launch.attention_bwd(
                dy.view_as(out), qkv, out, lse, bounds, longest, 0.125, 0.1, seed, 1
            )
            for longest in (512, 1024)
        ]
        return [y, *saved, *grads, *gelu, out, lse, *dqkvs]

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
