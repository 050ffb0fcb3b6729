"""Triton quantize_rows and linear_int8 against their references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import linear_int8
from fastbert.ops.linear_int8 import linear_int8_reference, quantize_rows_reference

from ._parity import (
    BF16,
    DEVICE,
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
