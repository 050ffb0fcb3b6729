"""Triton quantize_rows and linear_int8 against their references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import add_layer_norm, linear_int8
from fastbert.ops.linear_int8 import linear_int8_reference, quantize_rows_reference

from ._parity import (
    BF16,
    DEVICE,
    EPS,
    FP32,
    KERNEL_MARKS,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 3), (17, 64), (9, 600)])
def test_quantize_rows(shape, dtype):
    x = random(*shape, dtype=dtype)
    x[0] = -2.5
    x[-1, 0] = 100.0
    for got, expected in zip(linear_int8.quantize_rows(x), quantize_rows_reference(x), strict=True):
        assert torch.equal(got, expected)


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
    offset, column_sum = random(rows_), random(columns)
    for rest in ((bias, offset, column_sum), (bias, None, None), (None, offset, column_sum)):
        arguments = (q, scale, weight, weight_scale, *rest, activation)
        exact = linear_int8_reference(*arguments, torch.float64)
        got = linear_int8.linear_int8(*arguments, FP32)
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)


@kernel_test
@pytest.mark.parametrize("activation", [0, 1])
def test_linear_int8_to_int8(activation):
    """By one scale, known beforehand: the rounding of what the kernel itself gives in fp32."""
    torch.manual_seed(0)
    q, scale, offset = linear_int8.quantize_rows(random(70, 64))
    weight, weight_scale, _ = linear_int8.quantize_rows(random(90, 64))
    bias, column_sum = random(90), weight_scale * weight.sum(1)
    arguments = (q, scale, weight, weight_scale, bias, offset, column_sum, activation, FP32)
    wide = linear_int8.linear_int8(*arguments)
    for step in (0.05, 1.0):  # many numbers past the range, and none
        output_scale = torch.tensor([step], device=DEVICE)
        got = linear_int8.linear_int8(*arguments, output_scale)
        expected = (wide * (1 / output_scale)).round().clamp(-127, 127).to(torch.int8)
        assert got.dtype == torch.int8 and torch.equal(got, expected)


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (67, 96), (5, 600)], ids=str)
def test_layer_norm_gives_the_rows_that_quantize_rows_would(shape, dtype):
    torch.manual_seed(0)
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    x_bias, weight, bias, multiplier = (random(shape[1]) for _ in range(4))
    for before, by in (((residual, x_bias), multiplier), ((None, None), None)):
        tensors = (x, *before, weight, bias)
        y, *rows_of_y = add_layer_norm.add_layer_norm_int8(*tensors, by, EPS)
        plain = add_layer_norm.add_layer_norm_fwd(*tensors, EPS, 0.0, None, 0, False)[0]
        assert torch.equal(y, plain)
        scaled = y if by is None else y.float() * by
        for got, expected in zip(rows_of_y, linear_int8.quantize_rows(scaled), strict=True):
            assert torch.equal(got, expected)
