"""What the Triton kernels share: dropout masks, partial sums; and what holds of every launcher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastbert.kernels import (
    _philox,
    _reduce,
    add_layer_norm,
    attention,
    bias_gelu,
    cross_entropy,
    embed_layer_norm,
    rows,
)

from ._parity import (
    DEVICE,
    EPS,
    FP32,
    KERNEL_MARKS,
    SEED,
    dropout_args,
    in_the_first_process,
    kernel_test,
    philox_words,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


# --- dropout -----------------------------------------------------------------------------------


@triton.jit
def _keep_mask_kernel(
    out_ptr, seed_ptr, threshold, offset, plane, first_row, first_col, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, R)
    keep = _philox.keep_mask(seed_ptr, threshold, offset, plane, first_row + row, first_col, C)
    tl.store(out_ptr + row[:, None] * C + tl.arange(0, C)[None, :], keep.to(tl.int32))


def kept(seed, threshold, offset, plane, first_row, first_col, num_rows, num_cols):
    out = torch.empty(num_rows, num_cols, dtype=torch.int32, device=DEVICE)
    seed = torch.tensor([seed], dtype=torch.int64, device=DEVICE)
    where = (first_row, first_col)
    _keep_mask_kernel[(1,)](out, seed, threshold, offset, plane, *where, num_rows, num_cols)
    return out.cpu().numpy().astype(bool)


def test_oracle_gives_the_published_words():
    words = philox_words(0, 0, 0, 0, np.arange(4))
    assert [f"{w:08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@kernel_test
def test_keep_mask_gives_the_published_words():
    for col, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        assert kept(0, word, 0, 0, 0, 0, 1, 4)[0, col]
        assert not kept(0, word + 1, 0, 0, 0, 0, 1, 4)[0, col]


@kernel_test
@pytest.mark.parametrize("seed", [SEED, -1, 2**63 - 1])
@pytest.mark.parametrize("offset", [7, 2**31, 2**32 - 1])
def test_keep_mask_everywhere(seed, offset):
    plane, first_row, first_col, threshold = 3, 100_000, 64, 3_000_000_000
    row, col = first_row + np.arange(8)[:, None], first_col + np.arange(32)[None, :]
    expected = philox_words(seed, offset, plane, row, col) >= threshold
    got = kept(seed, threshold, offset, plane, first_row, first_col, 8, 32)
    assert (got == expected).all()


# --- partial sums ------------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 64, 70), (3, 150, 33)])
def test_sum_partials(shape):
    partial_sums = random(*shape)
    sums = _reduce.sum_partials(partial_sums, FP32)
    assert len(sums) == shape[0]
    torch.testing.assert_close(torch.stack(sums), partial_sums.sum(1))


# --- every launcher ----------------------------------------------------------------------------


@kernel_test
def test_no_tokens():
    x, vector = random(0, 64), random(64)
    ids, seed = torch.zeros(0, dtype=torch.int64, device=DEVICE), dropout_args(0.25)
    for cu_seqlens in ([0], [0, 0, 0]):
        qkv = random(0, 3, 2, 32)
        site = (torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE), 0, 0.1, *seed)
        out, lse = attention.attention_fwd(qkv, *site)
        assert out.shape == (0, 2, 32) and lse.shape == (2, 0)
        assert attention.attention_bwd(out, qkv, out, lse, *site).shape == (0, 3, 2, 32)
    assert bias_gelu.bias_gelu_fwd(x, vector, True).shape == (0, 64)
    dx, dbias = bias_gelu.bias_gelu_bwd(x, x, vector, True)
    assert dx.shape == (0, 64) and (dbias == 0).all()
    y, z, mean, rstd = add_layer_norm.add_layer_norm_fwd(
        x, x, vector, vector, vector, EPS, *seed, True
    )
    assert y.shape == z.shape == (0, 64) and mean.shape == rstd.shape == (0,)
    dz, dx, *sums = add_layer_norm.add_layer_norm_bwd(x, x, vector, mean, rstd, *seed, True)
    assert dz.shape == dx.shape == (0, 64) and all((s == 0).all() for s in sums)
    tables = (random(9, 64), random(8, 64), random(2, 64))
    y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
        ids, ids, ids, *tables, vector, vector, EPS, *seed
    )
    assert y.shape == (0, 64) and mean.shape == rstd.shape == (0,)
    grads = embed_layer_norm.embed_layer_norm_bwd(
        y, ids, ids, ids, *tables, vector, mean, rstd, *seed
    )
    assert all((g == 0).all() for g in grads)
    assert cross_entropy.cross_entropy_rows(x, vector, ids, -100, random(1)).shape == (0,)
    assert rows.gather_rows(x, ids).shape == (0, 64)
    assert (rows.scatter_rows(x, ids, 5) == 0).all()
