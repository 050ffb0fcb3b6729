"""Triton quantize_rows_fp8 and linear_fp8 against their references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import linear_fp8
from fastbert.ops.linear_fp8 import linear_fp8_reference, quantize_rows_fp8_reference

from ._parity import (
    BF16,
    DEVICE,
    FP32,
    INTERPRETED,
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


@pytest.fixture(autouse=True)
def fp8_units():
    if (
        not INTERPRETED
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        pytest.skip("fp8 matrix units come with sm_89")


SHAPES = [(1, 3), (17, 64), (9, 600)]


def check_rows(x):
    q, scale = linear_fp8.quantize_rows_fp8(x)
    expected, expected_scale = quantize_rows_fp8_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_numbers_that_e4m3_holds(shape, dtype):
    """Every row's largest is 448 times a power of two, which is then its scale."""
    torch.manual_seed(0)
    x = random(*shape).to(torch.float8_e4m3fn).float()
    x[:, 0] = 448.0
    check_rows((x * 2.0 ** torch.arange(-3, shape[0] - 3, device=DEVICE)[:, None]).to(dtype))


@kernel_test
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to e4m3 in a way of its own")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rounded_as_torch_rounds(shape, dtype):
    torch.manual_seed(0)
    x = random(*shape, dtype=dtype)
    x[0] = 0.0
    x[-1, 0] = 1000.0
    check_rows(x)


@kernel_test
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize(
    "size", [(1, 64, 16), (17, 96, 70), (130, 160, 200), (1160, 32, 300)], ids=str
)
def test_linear_fp8(size, activation):
    torch.manual_seed(0)
    rows_, width, columns = size
    q, scale = quantize_rows_fp8_reference(random(rows_, width))
    weight, weight_scale = quantize_rows_fp8_reference(random(columns, width, scale=width**-0.5))
    for bias in (random(columns), None):
        arguments = (weight, weight_scale, bias, activation)
        wide = [x if x is None or isinstance(x, int) else x.double() for x in arguments]
        exact = linear_fp8_reference(q.double(), scale.double(), *wide, torch.float64)
        got = linear_fp8.linear_fp8(q, scale, *arguments, FP32)
        # The sums of sm_89 and sm_90 keep 14 bits.
        step = 3e-6 if INTERPRETED else 2e-3
        torch.testing.assert_close(got.double(), exact, rtol=step, atol=step)


@kernel_test
def test_no_rows():
    q, scale = linear_fp8.quantize_rows_fp8(random(0, 64))
    assert q.shape == (0, 64) and scale.shape == (0,)
    weight, weight_scale = quantize_rows_fp8_reference(torch.ones(5, 64, device=DEVICE))
    assert linear_fp8.linear_fp8(q, scale, weight, weight_scale, None, 0, FP32).shape == (0, 5)
