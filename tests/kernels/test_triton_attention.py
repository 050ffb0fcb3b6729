"""Triton attention, forward and backward, against the fp64 formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import _attention_config, attention

from ._attention import attention_factors, attention_formula, cu_seqlens_of
from ._parity import (
    DEVICE,
    DOT_DTYPES,
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


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


def check_attention(lengths, head_dim, dtype, p, scale=1.0, num_heads=2):
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    qkv = random(num_tokens, 3, num_heads, head_dim, dtype=dtype, scale=scale)
    dout = random(num_tokens, num_heads, head_dim, dtype=dtype)
    cu_seqlens = cu_seqlens_of(lengths)
    max_seqlen = max(lengths) + 3  # any bound will do
    site = (cu_seqlens, max_seqlen, head_dim**-0.5, *dropout_args(p))
    out, lse = attention.attention_fwd(qkv, *site)
    dqkv = attention.attention_bwd(dout, qkv, out, lse, *site)

    factors = attention_factors(lengths, num_heads, p)
    formula = partial(attention_formula, lengths=lengths, factors=factors)
    assert_parity({"out": out, "qkv": dqkv}, formula, {"qkv": qkv}, dout)

    first = 0
    for length in lengths:
        q, k, _ = qkv[first : first + length].double().permute(1, 2, 0, 3)
        exact = (q @ k.transpose(1, 2) * head_dim**-0.5).logsumexp(-1)
        torch.testing.assert_close(
            lse[:, first : first + length].double(), exact, rtol=1e-5, atol=1e-5
        )
        first += length


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences fill several, with different sizes on each side."""
    tile = _attention_config.Tile
    tiles = _attention_config.Tiles(tile(32, 16, 4, 2), tile(16, 32, 4, 2), tile(16, 32, 4, 2))
    monkeypatch.setattr(_attention_config, "tiles", lambda *args: tiles)


LENGTHS = [1, 0, 40, 17]


@kernel_test
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("head_dim", [32, 64, 40])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_attention(dtype, head_dim, p, small_tiles):
    check_attention(LENGTHS, head_dim, dtype, p)


@kernel_test
@pytest.mark.parametrize("lengths", [[130], [1, 1, 1], [0, 128, 0]])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_attention_with_the_launch_choices(dtype, lengths):
    check_attention(lengths, 64, dtype, 0.25, num_heads=1)


@kernel_test
def test_attention_of_extreme_scores(small_tiles):
    check_attention([20, 40], 32, FP32, 0.0, scale=30.0)


@kernel_test
def test_attention_never_mixes_sequences(small_tiles):
    torch.manual_seed(0)
    qkv = random(60, 3, 2, 32)
    cu_seqlens = torch.tensor([0, 20, 60], dtype=torch.int32, device=DEVICE)
    site = (cu_seqlens, 40, 0.2, 0.0, None, 0)
    out, lse = attention.attention_fwd(qkv, *site)
    qkv[:20] = float("nan")
    other, other_lse = attention.attention_fwd(qkv, *site)
    assert torch.equal(out[20:], other[20:]) and torch.equal(lse[:, 20:], other_lse[:, 20:])
    dqkv = attention.attention_bwd(other, qkv, other, other_lse, *site)
    assert dqkv[20:].isfinite().all()
