"""The numbers of the Triton launchers, forward and every gradient, against fp64 formulas.

The kernel tests run on CPU tensors under Triton's interpreter, which has to be chosen before Triton
is imported: ``test_under_the_interpreter`` runs this file again in such a process. Elsewhere they
are the ``gpu`` twins of the same cases, with bf16 in addition.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastbert.kernels import (
    _config,
    _philox,
    _reduce,
    _table_gradient,
    add_layer_norm,
    attention,
    bias_gelu,
    cross_entropy,
    embed_layer_norm,
    linear_int8,
    rows,
)
from fastbert.ops.linear_int8 import linear_int8_reference, quantize_rows_reference

INTERPRETED = not isinstance(rows._gather_rows_kernel, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The interpreter multiplies bf16 matrices wrongly (Triton 3.6 to 3.9) and gets all else right.
DOT_DTYPES = [FP32, FP16] if INTERPRETED else [FP32, FP16, BF16]

# NumPy, under the interpreter, announces each overflow that a kernel provides for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEED, SITE = (123456789 << 32) | 987654321, 5


def kernel_test(test):
    """A test that launches kernels: here if they are interpreted, else on a GPU."""
    if INTERPRETED:
        return test
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")
    return pytest.mark.gpu(skip(test))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_under_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    # From another folder: `python -m` would put the repository's root on sys.path.
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh tensors hold NaN (integers their maximum): an element left unwritten cannot pass."""

    def poisoned(function):
        def allocate(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


# --- oracle ------------------------------------------------------------------------------------


def philox_words(seed, offset, plane, row, col):
    """uint32 word of each broadcast position; straight from the paper, in 64-bit integers."""
    c = [np.asarray(v, np.uint64) for v in np.broadcast_arrays(col // 4, row, offset, plane)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> shift) ^ c[1] ^ k[0],
            product1 & low,
            (product0 >> shift) ^ c[3] ^ k[1],
            product0 & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.choose(np.broadcast_to(col % 4, c[0].shape), c).astype(np.uint32)


def dropout_factors(p, row, col, plane=0):
    """What dropout multiplies each position by: 0 or 1 / (1 - p)."""
    words = philox_words(SEED, SITE, plane, row, col)
    keep = words >= np.uint32(int(p * 2.0**32))
    return torch.from_numpy(np.where(keep, 1.0 / (1.0 - p), 0.0)).to(DEVICE)


def hidden_factors(p, shape):
    return dropout_factors(p, np.arange(shape[0])[:, None], np.arange(shape[1])[None, :])


def dropout_args(p):
    return p, torch.tensor([SEED], device=DEVICE) if p else None, SITE


def random(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def differentiate(formula, inputs, dout, dtype):
    """formula(**inputs) and its gradient by each input that is not None, computed in ``dtype``."""
    leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items() if x is not None}
    out = formula(**{**inputs, **leaves})
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_parity(ours, formula, inputs, dout):
    """Each result errs at most twice as much as torch in the same dtype, plus a few roundings."""
    dtype = dout.dtype
    exact = differentiate(formula, inputs, dout, torch.float64)
    plain = differentiate(formula, inputs, dout, dtype)
    assert ours.keys() <= exact.keys()
    for name, result in ours.items():
        assert result.shape == exact[name].shape, name
        scale = exact[name].abs().max().item() if exact[name].numel() else 0.0
        atol = 4 * torch.finfo(result.dtype).eps * max(scale, 1e-3)
        error = _error(result, exact[name])
        assert error <= 2 * _error(plain[name], exact[name]) + atol, (name, error, atol)


def _error(x, exact):
    difference = (x.double() - exact).abs()
    return difference.max().item() if difference.numel() else 0.0


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


# --- attention ---------------------------------------------------------------------------------


def attention_formula(qkv, *, lengths, factors):
    """Softmax attention sequence by sequence; ``factors``: dropout by (sequence) or None."""
    outs, first = [], 0
    for i, length in enumerate(lengths):
        q, k, v = qkv[first : first + length].permute(1, 2, 0, 3)
        p = (q @ k.transpose(1, 2) * qkv.shape[3] ** -0.5).softmax(-1)
        if factors is not None:
            p = p * factors[i].to(p.dtype)
        outs.append((p @ v).transpose(0, 1))
        first += length
    return torch.cat(outs)


def attention_factors(lengths, num_heads, p):
    factors, first = [], 0
    for length in lengths:
        row = first + np.arange(length)[None, :, None]
        plane = np.arange(num_heads)[:, None, None]
        factors.append(dropout_factors(p, row, np.arange(length)[None, None, :], plane))
        first += length
    return factors


def check_attention(lengths, head_dim, dtype, p, scale=1.0, num_heads=2):
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    qkv = random(num_tokens, 3, num_heads, head_dim, dtype=dtype, scale=scale)
    dout = random(num_tokens, num_heads, head_dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    max_seqlen = max(lengths) + 3  # any bound will do
    site = (cu_seqlens, max_seqlen, head_dim**-0.5, *dropout_args(p))
    out, lse = attention.attention_fwd(qkv, *site)
    dqkv = attention.attention_bwd(dout, qkv, out, lse, *site)

    factors = attention_factors(lengths, num_heads, p) if p else None
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
    tile = _config.AttentionTile
    tiles = _config.AttentionTiles(tile(32, 16, 4, 2), tile(16, 32, 4, 2), tile(16, 32, 4, 2))
    monkeypatch.setattr(_config, "attention", lambda *args: tiles)


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


# --- bias_gelu ---------------------------------------------------------------------------------


def bias_gelu_formula(x, bias, tanh):
    return F.gelu(x if bias is None else x + bias, approximate="tanh" if tanh else "none")


def check_bias_gelu(x, bias, tanh):
    dy = random(*x.shape, dtype=x.dtype)
    y = bias_gelu.bias_gelu_fwd(x, bias, tanh)
    dx, dbias = bias_gelu.bias_gelu_bwd(dy, x, bias, tanh)
    ours = {"out": y, "x": dx}
    if bias is None:
        assert dbias is None
    else:
        assert dbias.dtype == bias.dtype
        ours["bias"] = dbias
    assert_parity(ours, partial(bias_gelu_formula, tanh=tanh), {"x": x, "bias": bias}, dy)


@kernel_test
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape", [(1, 64), (67, 96), (40, 600)])
def test_bias_gelu(shape, dtype, tanh):
    torch.manual_seed(0)
    check_bias_gelu(random(*shape, dtype=dtype, scale=3.0), random(shape[1], dtype=dtype), tanh)


@kernel_test
@pytest.mark.parametrize("bias_dtype", [None, FP32])
def test_bias_gelu_bias_is_optional_or_fp32(bias_dtype):
    torch.manual_seed(0)
    bias = None if bias_dtype is None else random(64, dtype=bias_dtype)
    check_bias_gelu(random(9, 64, dtype=FP16), bias, True)


@kernel_test
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_of_extreme_values(tanh):
    u = torch.tensor([0.0, -0.0, 1e-30, 5.0, 9.0, 30.0, 1e4, 1e18, 3e38], device=DEVICE)
    x = torch.cat([u, -u])[None]
    y = bias_gelu.bias_gelu_fwd(x, None, tanh)
    dx, _ = bias_gelu.bias_gelu_bwd(torch.ones_like(x), x, None, tanh)
    formula = partial(bias_gelu_formula, bias=None, tanh=tanh)
    exact = differentiate(formula, {"x": x}, torch.ones_like(x), torch.float64)
    torch.testing.assert_close(y.double(), exact["out"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact["x"], rtol=1e-6, atol=1e-6)


# --- add_layer_norm ----------------------------------------------------------------------------

EPS = 1e-12


def add_layer_norm_formula(x, residual, x_bias, weight, bias, factors):
    z = x if x_bias is None else x + x_bias
    if factors is not None:
        z = z * factors.to(z.dtype)
    if residual is not None:
        z = z + residual
    return F.layer_norm(z, z.shape[1:], weight, bias, EPS)


def check_add_layer_norm(shape, dtype, vector_dtype, p, with_residual=True, with_x_bias=True):
    torch.manual_seed(0)
    width = shape[1]
    x, dy = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    residual = random(*shape, dtype=dtype) if with_residual else None
    x_bias = random(width, dtype=vector_dtype) if with_x_bias else None
    weight = random(width, dtype=vector_dtype, scale=0.1) + 1
    bias = random(width, dtype=vector_dtype)
    operands = (x, residual, x_bias, weight, bias, EPS, *dropout_args(p))
    y, z, mean, rstd = add_layer_norm.add_layer_norm_fwd(*operands, True)
    assert torch.equal(y, add_layer_norm.add_layer_norm_fwd(*operands, False)[0])
    dz, dx, dweight, dbias, dx_bias = add_layer_norm.add_layer_norm_bwd(
        dy, z, weight, mean, rstd, *dropout_args(p), with_x_bias
    )
    assert (dx is dz) == (p == 0.0)
    assert dweight.dtype == dbias.dtype == vector_dtype
    ours = {"out": y, "x": dx, "weight": dweight, "bias": dbias}
    ours |= {"residual": dz} if with_residual else {}
    if with_x_bias:
        ours["x_bias"] = dx_bias
    else:
        assert dx_bias is None
    inputs = {"x": x, "residual": residual, "x_bias": x_bias, "weight": weight, "bias": bias}
    factors = hidden_factors(p, shape) if p else None
    assert_parity(ours, partial(add_layer_norm_formula, factors=factors), inputs, dy)
    variance, exact_mean = torch.var_mean(z.double(), 1, correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=1e-6)


@kernel_test
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape", [(1, 64), (70, 96)])
def test_add_layer_norm(shape, dtype, p):
    check_add_layer_norm(shape, dtype, dtype, p)


@kernel_test
@pytest.mark.parametrize("with_residual, with_x_bias", [(False, True), (True, False)])
def test_add_layer_norm_options(with_residual, with_x_bias):
    check_add_layer_norm((21, 64), FP16, FP32, 0.25, with_residual, with_x_bias)


@kernel_test
def test_add_layer_norm_of_wide_rows():
    check_add_layer_norm((3, 1100), FP32, FP32, 0.0)


@kernel_test
def test_add_layer_norm_of_rows_far_from_zero():
    torch.manual_seed(0)
    x, weight, bias = random(5, 96) + 1000.0, torch.ones(96, device=DEVICE), random(96)
    y, *_ = add_layer_norm.add_layer_norm_fwd(x, None, None, weight, bias, EPS, 0.0, None, 0, False)
    formula = partial(add_layer_norm_formula, residual=None, x_bias=None, factors=None)
    inputs = {"x": x, "weight": weight, "bias": bias}
    assert_parity({"out": y}, formula, inputs, torch.ones_like(x))


# --- embed_layer_norm --------------------------------------------------------------------------


def embed_formula(word, position, token_type, weight, bias, *, ids, factors):
    e = word[ids[0]] + position[ids[1]]
    if token_type is not None:
        e = e + token_type[ids[2]]
    y = F.layer_norm(e, e.shape[1:], weight, bias, EPS)
    return y if factors is None else y * factors.to(y.dtype)


def check_embed(ids, sizes, width, dtype, vector_dtype, p):
    """ids: three id vectors, the last None for a model without token types; sizes: table rows."""
    torch.manual_seed(0)
    ids = [None if i is None else i.to(DEVICE) for i in ids]
    shape = (ids[0].shape[0], width)
    word, position, token_type = (random(n, width, dtype=dtype) for n in sizes)
    if ids[2] is None:
        token_type = None
    weight = random(width, dtype=vector_dtype, scale=0.1) + 1
    bias = random(width, dtype=vector_dtype)
    dy = random(*shape, dtype=dtype)
    tables = (word, position, token_type)
    y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
        *ids, *tables, weight, bias, EPS, *dropout_args(p)
    )
    grads = embed_layer_norm.embed_layer_norm_bwd(
        dy, *ids, *tables, weight, mean, rstd, *dropout_args(p)
    )
    names = ("word", "position", "token_type", "weight", "bias")
    ours = {"out": y, **dict(zip(names, grads, strict=True))}
    inputs = dict(zip(names, (*tables, weight, bias), strict=True))
    if token_type is None:
        assert ours.pop("token_type") is None
    for name, grad in ours.items():
        assert grad.dtype == (dtype if name == "out" else inputs[name].dtype), name
    factors = hidden_factors(p, shape) if p else None
    formula = partial(embed_formula, ids=ids, factors=factors)
    assert_parity(ours, formula, inputs, dy)
    unused = torch.ones(sizes[0], dtype=torch.bool, device=DEVICE)
    unused[ids[0]] = False
    assert (ours["word"][unused] == 0).all()


def packed_ids(num_tokens, num_words):
    generator = torch.Generator().manual_seed(1)
    word_ids = torch.randint(num_words, (num_tokens,), generator=generator)
    return word_ids, torch.arange(num_tokens) % 50, (torch.arange(num_tokens) % 50 > 20).long()


@kernel_test
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_embed_layer_norm(dtype, p):
    check_embed(packed_ids(70, 90), (90, 50, 2), 96, dtype, dtype, p)


@kernel_test
def test_embed_layer_norm_without_token_types():
    word_ids, position_ids, _ = packed_ids(1, 90)
    check_embed((word_ids, position_ids, None), (90, 50, 2), 64, FP16, FP32, 0.0)


@kernel_test
@pytest.mark.parametrize("num_words", [1, 3, 40, 200, 40_000])
def test_table_gradients_of_runs_across_chunks(num_words, monkeypatch):
    """Runs of every length against chunks of 4 sorted tokens, joined 2 at a time."""
    monkeypatch.setattr(_config, "RUN_CHUNK", 4)
    monkeypatch.setattr(_config, "join_chunks", lambda: (2, 32, 4))
    check_embed(packed_ids(61, num_words), (num_words, 50, 2), 40, FP32, FP32, 0.0)


@kernel_test
def test_ids_out_of_range_read_an_edge_and_write_nothing():
    torch.manual_seed(0)
    word, position, weight = random(9, 64), random(8, 64), torch.ones(64, device=DEVICE)
    bad = torch.tensor([-1, 9, 3, 2**40, 3, -(2**40)], device=DEVICE)
    position_ids = torch.tensor([0, 1, 2, 3, 99, -5], device=DEVICE)
    site = (EPS, *dropout_args(0.0))
    y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
        bad, position_ids, None, word, position, None, weight, weight, *site
    )
    clamped = (bad.clamp(0, 8), position_ids.clamp(0, 7))
    expected = embed_formula(word, position, None, weight, weight, ids=clamped, factors=None)
    torch.testing.assert_close(y, expected)
    dy = random(6, 64)
    dword, dposition, *_ = embed_layer_norm.embed_layer_norm_bwd(
        dy, bad, position_ids, None, word, position, None, weight, mean, rstd, *dropout_args(0.0)
    )
    assert dword[3].abs().sum() > 0 and (dword[[0, 1, 2, 4, 5, 6, 7, 8]] == 0).all()
    assert (dposition[:4] != 0).any(1).all() and (dposition[4:] == 0).all()


@kernel_test
@pytest.mark.parametrize("chunk", [2, 32])
def test_ids_out_of_range_leave_the_rows_around_a_table_alone(chunk, monkeypatch):
    monkeypatch.setattr(_config, "RUN_CHUNK", chunk)
    guarded = torch.zeros(11, 64, device=DEVICE)  # rows 1 to 9 are the gradient of a table of 9
    monkeypatch.setattr(torch, "zeros_like", lambda x: guarded[1:10])
    ids = torch.tensor([-1] * 5 + [4] * 3 + [9] * 5, device=DEVICE)
    _table_gradient.sum_runs(torch.ones(13, 64, device=DEVICE), ids, torch.empty(9, 64))
    expected = torch.zeros(11, 64, device=DEVICE)
    expected[1 + 4] = 3
    assert torch.equal(guarded, expected)


# --- cross_entropy_rows ------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("bias_dtype", [None, "same", FP32])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("num_classes", [256, 300, 7])
def test_cross_entropy_rows(num_classes, dtype, bias_dtype, monkeypatch):
    monkeypatch.setattr(_config, "cross_entropy_rows", lambda num_classes: (128, 4))
    torch.manual_seed(0)
    # Logits are computed in the sum's dtype: the exact answer is about the same rounded inputs.
    storage = random(9, num_classes + 8, dtype=dtype, scale=5.0)
    logits, padding = storage[:, :num_classes], storage[:, num_classes:].clone()
    bias = None
    if bias_dtype is not None:
        bias = random(num_classes, dtype=dtype if bias_dtype == "same" else bias_dtype)
    labels = torch.randint(num_classes, (9,), device=DEVICE)
    labels[[2, 8]] = -100
    u = logits.double() + (0 if bias is None else bias.double())
    exact = F.cross_entropy(u, labels, ignore_index=-100, reduction="none")
    scale = torch.tensor([0.37], device=DEVICE)
    onehot = F.one_hot(labels.clamp(min=0), num_classes)
    exact_grad = (u.softmax(1) - onehot) * (labels != -100)[:, None] * scale.double()

    before = logits.clone()
    loss = cross_entropy.cross_entropy_rows(logits, bias, labels, -100, None)
    assert torch.equal(logits, before)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(cross_entropy.cross_entropy_rows(logits, bias, labels, -100, scale), loss)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact_grad, rtol=eps, atol=max(1e-6, eps / 100))
    assert torch.equal(storage[:, num_classes:], padding)


@kernel_test
def test_cross_entropy_of_bad_labels_and_extreme_logits():
    logits = torch.tensor([[1.0] * 5, [2.0] * 5, [-torch.inf] * 4 + [3e4], [0.0] * 5, [1e4] * 5])
    logits = logits.repeat_interleave(200, 1).to(DEVICE)  # classes in runs of 200
    labels = torch.tensor([1000, -1, 999, -100, 3], device=DEVICE)
    exact = F.cross_entropy(logits[2:].double(), labels[2:], reduction="none", ignore_index=-100)
    scale = torch.ones(1, device=DEVICE)
    loss = cross_entropy.cross_entropy_rows(logits, None, labels, -100, scale)
    assert loss[:2].isnan().all() and logits[:2].isnan().all()
    torch.testing.assert_close(loss[2:].double(), exact, rtol=1e-6, atol=1e-6)
    assert logits[2:].isfinite().all() and (logits[3] == 0).all()


# --- rows --------------------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [64, 600, 3])
def test_gather_and_scatter_rows(width, dtype):
    x = random(70, width, dtype=dtype)
    index = torch.arange(1, 70, 3, device=DEVICE)
    gathered = rows.gather_rows(x, index)
    assert torch.equal(gathered, x[index])
    scattered = rows.scatter_rows(gathered, index, 70)
    assert torch.equal(scattered[index], gathered)
    scattered[index] = 0
    assert (scattered == 0).all()


@kernel_test
def test_rows_out_of_range_are_neither_read_nor_written():
    x = random(4, 64)
    index = torch.tensor([-1, 1, 4, 2**40], device=DEVICE)
    gathered = rows.gather_rows(x, index)
    assert torch.equal(gathered[1], x[1]) and (gathered[[0, 2, 3]] == 0).all()
    scattered = rows.scatter_rows(x, index, 4)
    assert torch.equal(scattered[1], x[1]) and (scattered[[0, 2, 3]] == 0).all()


# --- linear_int8 -------------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 3), (17, 64), (9, 600)])
def test_quantize_rows(shape, dtype):
    x = random(*shape, dtype=dtype)
    x[0] = 0
    x[-1, 0] = 100.0
    q, scale = linear_int8.quantize_rows(x)
    expected, expected_scale = quantize_rows_reference(x)
    assert torch.equal(q, expected) and torch.equal(scale, expected_scale)


@kernel_test
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 64, 16), (17, 96, 70), (130, 40, 200)], ids=str)
def test_linear_int8(size, activation):
    rows_, width, columns = size
    generator = torch.Generator().manual_seed(0)

    def int8(*shape):
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)

    q, weight = int8(rows_, width), int8(columns, width)
    scale, weight_scale, bias = random(rows_).abs(), random(columns).abs() * 1e-4, random(columns)
    for b in (bias, None):
        arguments = (q, scale, weight, weight_scale, b, activation)
        exact = linear_int8_reference(*arguments, torch.float64)
        got = linear_int8.linear_int8(*arguments, FP32)
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@kernel_test
def test_same_inputs_give_the_same_bits():
    torch.manual_seed(0)
    x, dy, vector = random(1000, 768, dtype=BF16), random(1000, 768, dtype=BF16), random(768)
    qkv, dout = random(1000, 3, 12, 64, dtype=BF16), random(1000, 12, 64, dtype=BF16)
    cu_seqlens = torch.tensor([0, 400, 1000], dtype=torch.int32, device=DEVICE)
    ids = torch.randint(5, (1000,), device=DEVICE)
    table, dropout = random(5, 768, dtype=BF16), dropout_args(0.1)
    site = (cu_seqlens, 600, 0.125, *dropout)

    def run():
        out, lse = attention.attention_fwd(qkv, *site)
        mean, rstd = x.float().mean(1), x.float().var(1).rsqrt()
        return [
            out,
            attention.attention_bwd(dout, qkv, out, lse, *site),
            *bias_gelu.bias_gelu_bwd(dy, x, vector, False),
            *add_layer_norm.add_layer_norm_bwd(dy, x, vector, mean, rstd, *dropout, True),
            *embed_layer_norm.embed_layer_norm_bwd(
                dy, ids, ids, None, table, table, None, vector, mean, rstd, *dropout
            )[:2],
        ]

    first = run()
    for _ in range(10):
        assert all(map(torch.equal, first, run()))
