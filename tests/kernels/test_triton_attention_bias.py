"""Triton attention with an additive bias: forward and each backward, against the fp64 formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import _attention_config, attention

from ._attention import attention_factors, attention_formula, cu_seqlens_of
from ._parity import (
    BF16,
    DEVICE,
    DOT_DTYPES,
    FP16,
    FP32,
    KERNEL_MARKS,
    assert_parity,
    dropout_args,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

each_way = pytest.mark.parametrize("way", attention.BACKWARDS)
NEVER = -torch.inf
LENGTHS = [1, 0, 40, 17]


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences fill several; one-kernel tiles in every dtype."""
    tile = _attention_config.Tile
    tiles = _attention_config.Tiles(tile(32, 16, 4, 2), tile(16, 32, 4, 2), tile(16, 32, 4, 2))
    monkeypatch.setattr(_attention_config, "tiles", lambda *args: tiles)
    monkeypatch.setattr(_attention_config, "bwd_short", lambda *args: tile(64, 16, 4, 2))
    monkeypatch.setattr(_attention_config, "bwd_one_pass", lambda *args: tile(16, 32, 4, 2))


def random_bias(heads, lengths, width, dtype):
    """Normal numbers, a third of them -inf, rows and key tiles all -inf; nan past every end."""
    bias = random(heads, sum(lengths), width, dtype=dtype)
    bias[random(*bias.shape) > 0.4] = NEVER
    bias[:, 1::5] = NEVER
    bias[:, ::3, :20] = NEVER  # whole tiles that some queries do not see, the first one
    for part, length in zip(bias.split(lengths, 1), lengths, strict=True):
        part[..., length:] = float("nan")
    return bias


def check(way, lengths, head_dim, dtype, p, bias, num_heads=2):
    qkv = random(sum(lengths), 3, num_heads, head_dim, dtype=dtype)
    dout = random(sum(lengths), num_heads, head_dim, dtype=dtype)
    site = (cu_seqlens_of(lengths), bias.shape[2], head_dim**-0.5, *dropout_args(p))
    out, lse = attention.attention_fwd(qkv, *site, bias)
    dqkv = attention.BACKWARDS[way](dout, qkv, out, lse, *site, bias)
    factors = attention_factors(lengths, num_heads, p)
    formula = partial(attention_formula, lengths=lengths, factors=factors, bias=bias)
    assert_parity({"out": out, "qkv": dqkv}, formula, {"qkv": qkv}, dout)
    blind = torch.cat(
        [
            (b[..., :n] == NEVER).all(-1)
            for b, n in zip(bias.split(lengths, 1), lengths, strict=True)
        ],
        1,
    ).expand(num_heads, -1)
    assert torch.equal(lse == NEVER, blind) and lse[~blind].isfinite().all()
    assert (out.transpose(0, 1)[blind] == 0).all() and (
        dqkv[:, 0].transpose(0, 1)[blind] == 0
    ).all()


@kernel_test
@each_way
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_bias(way, dtype, heads, p, small_tiles):
    """A bias of its own for each head, or one for all; wider than the longest sequence."""
    torch.manual_seed(0)
    check(way, LENGTHS, 32, dtype, p, random_bias(heads, LENGTHS, 43, FP32))


@kernel_test
@each_way
@pytest.mark.parametrize("dtype", [torch.float64, BF16, FP16])
def test_dtype_of_the_bias(way, dtype, small_tiles):
    torch.manual_seed(0)
    check(way, LENGTHS, 32, FP16, 0.0, random_bias(2, LENGTHS, 40, dtype))


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_with_the_launch_choices(dtype):
    torch.manual_seed(0)
    qkv, dout = random(130, 3, 1, 64, dtype=dtype), random(130, 1, 64, dtype=dtype)
    bias, site = random_bias(1, [130], 130, dtype), (cu_seqlens_of([130]), 130, 0.125)
    site += dropout_args(0.25)
    out, lse = attention.attention_fwd(qkv, *site, bias)
    dqkv = attention.attention_bwd(dout, qkv, out, lse, *site, bias)
    factors = attention_factors([130], 1, 0.25)
    formula = partial(attention_formula, lengths=[130], factors=factors, bias=bias)
    assert_parity({"out": out, "qkv": dqkv}, formula, {"qkv": qkv}, dout)


@kernel_test
@each_way
def test_nobody_sees_anybody(way, small_tiles):
    torch.manual_seed(0)
    qkv, dout = random(33, 3, 2, 32), random(33, 2, 32)
    bias = torch.full((1, 33, 33), NEVER, device=DEVICE)
    site = (cu_seqlens_of([33]), 33, 0.2, *dropout_args(0.25))
    out, lse = attention.attention_fwd(qkv, *site, bias)
    assert (out == 0).all() and (lse == NEVER).all()
    assert (attention.BACKWARDS[way](dout, qkv, out, lse, *site, bias) == 0).all()


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_for_every_device(arch):
    for head_dim in (1, 32, 40, 64, 128, 256):
        for itemsize in (2, 4):
            for dropout in (False, True):
                call = (head_dim, itemsize, dropout, arch, True)
                for tile in _attention_config.tiles(*call):
                    assert min(tile.block_m, tile.block_n) >= 16  # tl.dot's least
                short = _attention_config.bwd_short(*call)
                assert short is None or (itemsize == 2 and head_dim <= 64)
                longest = 0 if short is None else short.block_m
                assert _attention_config.bwd(longest + 1, *call) == "two_kernels"
