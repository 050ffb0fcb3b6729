"""Triton bias_gelu, add_layer_norm, embed_layer_norm and their gradients, against fp64 formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastbert.kernels import _config, _table_gradient, add_layer_norm, bias_gelu, embed_layer_norm

from ._parity import (
    BF16,
    DEVICE,
    EPS,
    FP16,
    FP32,
    KERNEL_MARKS,
    assert_parity,
    differentiate,
    dropout_args,
    hidden_factors,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


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
