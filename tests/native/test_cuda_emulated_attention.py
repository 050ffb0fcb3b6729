"""The CUDA kernels of attention executed on the CPU: the sources that nvcc compiles, emulated.

Inputs end where readable memory ends, outputs and shared memory start as NaN, asynchronous copies
arrive as late as their wait allows: what a GPU may do, the emulation does.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from .cuda_emulator import checks, emulator
from .cuda_emulator.emulator import ONE_BLOCK, TWO_KERNELS, misaligned

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
DROPOUT = pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p.3"])
place = emulator.fenced


def test_wgmma_is_taken_where_allowed(emulated: emulator.EmulatedCuda) -> None:
    assert emulated.has_wgmma()
    assert emulated.allow_wgmma(False) and not emulated.allow_wgmma(True)


@DROPOUT
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_on_tensor_cores(
    launch: ModuleType, tensor_cores: str, head_dim: int, dtype: torch.dtype, p: float
) -> None:
    checks.attention(launch, place, [0, 1, 65, 0, 64], 2, head_dim, dtype, p=p)


@DROPOUT
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_attention_of_32_dimensions(launch: ModuleType, dtype: torch.dtype, p: float) -> None:
    checks.attention(launch, place, [0, 1, 65, 0, 64], 2, 32, dtype, p=p)


@DROPOUT
@pytest.mark.parametrize("lengths", [[63], [1, 1, 0, 130], [129, 0], []], ids=str)
def test_attention_over_ragged_lengths(
    launch: ModuleType, tensor_cores: str, lengths: list[int], p: float
) -> None:
    checks.attention(launch, place, lengths, 1, 64, BF16, p=p, slack=70)


@pytest.mark.parametrize(("head_dim", "length"), [(64, 300), (128, 650)])
def test_attention_comes_round_its_stages(
    launch: ModuleType, tensor_cores: str, head_dim: int, length: int
) -> None:
    """Five tiles of keys and a ragged one: each of the three stages is filled twice."""
    checks.attention(launch, place, [length], 1, head_dim, BF16, p=0.1)


@DROPOUT
@DTYPES
def test_attention_of_any_head_dim(launch: ModuleType, dtype: torch.dtype, p: float) -> None:
    checks.attention(launch, place, [0, 1, 31, 32, 33, 64], 3, 20, dtype, p=p)


def test_attention_in_fp32(launch: ModuleType) -> None:
    checks.attention(launch, place, [65, 0, 3], 2, 64, FP32, p=0.1)


@pytest.mark.parametrize("scale", [0.0, 1e-60, -0.2, 3.0], ids=str)
def test_attention_takes_any_scale(launch: ModuleType, scale: float) -> None:
    checks.attention(launch, place, [5, 40], 1, 32, FP16, scale=scale)


def test_attention_off_16_byte_boundaries(launch: ModuleType) -> None:
    checks.attention(launch, misaligned, [3, 40], 1, 32, BF16)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_attention_does_not_depend_on_timing(
    launch: ModuleType,
    emulated: emulator.EmulatedCuda,
    tensor_cores: str,
    reverse: bool,
    eager: bool,
) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return checks.attention(launch, place, [260, 20], 1, 64, BF16, p=0.1)

    usual = run()
    emulated.configure(reverse_threads=reverse, eager_copies=eager)
    for got, want in zip(run(), usual, strict=True):
        assert torch.equal(got, want)


@DROPOUT
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_attention_bwd_on_tensor_cores(
    launch: ModuleType, head_dim: int, dtype: torch.dtype, p: float
) -> None:
    checks.attention_bwd(launch, place, [0, 1, 65, 0, 64], 2, head_dim, dtype, p=p)


@DROPOUT
@pytest.mark.parametrize("lengths", [[63, 127], [1, 1, 0, 129], [128], []], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("one_block", [True, False], ids=["one block", "two kernels"])
def test_attention_bwd_over_ragged_lengths(
    launch: ModuleType, emulated: emulator.EmulatedCuda, one_block: bool, head_dim: int,
    lengths: list[int], p: float,
) -> None:  # fmt: skip
    emulated.configure(shared_bytes=ONE_BLOCK if one_block else TWO_KERNELS)
    checks.attention_bwd(launch, place, lengths, 1, head_dim, BF16, p=p, slack=70)


@pytest.mark.parametrize(
    ("head_dim", "lengths"),
    [(32, [200, 3]), (64, [257, 1, 130]), (64, [512]), (128, [224])],
    ids=str,
)
def test_attention_bwd_sums_dq_over_key_tiles(
    launch: ModuleType, head_dim: int, lengths: list[int]
) -> None:
    checks.attention_bwd(launch, place, lengths, 1, head_dim, FP16, p=0.1)


@pytest.mark.parametrize(("head_dim", "length"), [(32, 513), (64, 513), (128, 225)])
def test_attention_bwd_above_what_one_block_takes(
    launch: ModuleType, head_dim: int, length: int
) -> None:
    checks.attention_bwd(launch, place, [3, length], 1, head_dim, BF16, p=0.1)


@DROPOUT
@DTYPES
def test_attention_bwd_of_any_head_dim(launch: ModuleType, dtype: torch.dtype, p: float) -> None:
    checks.attention_bwd(launch, place, [0, 1, 31, 32, 33, 64], 3, 20, dtype, p=p)


def test_attention_bwd_in_fp32(launch: ModuleType) -> None:
    checks.attention_bwd(launch, place, [65, 0, 3], 2, 64, FP32, p=0.1)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
@pytest.mark.parametrize("head_dim", [20, 32])
def test_attention_bwd_takes_any_scale(launch: ModuleType, head_dim: int, scale: float) -> None:
    checks.attention_bwd(launch, place, [5, 40], 1, head_dim, FP16, scale=scale)


def test_attention_bwd_off_16_byte_boundaries(launch: ModuleType) -> None:
    checks.attention_bwd(launch, misaligned, [3, 40], 1, 32, BF16)


@pytest.mark.parametrize("length", [40, 129])
@pytest.mark.parametrize("one_block", [True, False], ids=["one block", "two kernels"])
def test_attention_bwd_masks_keys_whose_exp_overflows(
    launch: ModuleType, emulated: emulator.EmulatedCuda, one_block: bool, length: int
) -> None:
    """Scores are -256 and a little noise: exp(0 - lse), as a key past the end has it, is inf."""
    emulated.configure(shared_bytes=ONE_BLOCK if one_block else TWO_KERNELS)
    qkv = torch.randn(length, 3, 1, 64, generator=torch.Generator().manual_seed(3))
    qkv[:, 0] += 32.0
    qkv[:, 1] -= qkv[:, 1].mean(-1, keepdim=True) + 1.0
    checks.attention_bwd_of(launch, place, qkv.to(BF16), [0, length], 0.125, 0.0, 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "lengths", "shared_bytes"),
    [
        (64, [130, 20], ONE_BLOCK),
        (128, [130, 20], ONE_BLOCK),
        (64, [130, 20], TWO_KERNELS),
        (20, [40, 20], ONE_BLOCK),
    ],
    ids=["one key tile", "two key tiles", "two kernels", "any"],
)
def test_attention_bwd_does_not_depend_on_timing(
    launch: ModuleType, emulated: emulator.EmulatedCuda, head_dim: int, lengths: list[int],
    shared_bytes: int, reverse: bool, eager: bool,
) -> None:  # fmt: skip
    def run() -> torch.Tensor:
        return checks.attention_bwd(launch, place, lengths, 1, head_dim, BF16, p=0.1)

    emulated.configure(shared_bytes=shared_bytes)
    usual = run()
    emulated.configure(shared_bytes=shared_bytes, reverse_threads=reverse, eager_copies=eager)
    assert torch.equal(run(), usual)


def test_attention_bwd_refuses_heads_that_do_not_fit(launch: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="attention_bwd: head dimension 4000 is too large"):
        checks.attention_bwd(launch, place, [1], 1, 4000, FP32)
