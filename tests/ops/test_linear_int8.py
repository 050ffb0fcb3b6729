"""quantize_rows and linear_int8 against NumPy's integers, and the whole against a float Linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import column_sums, linear_int8, quantize_rows

from ._targets import Draw, Target, targets

pytestmark = pytest.mark.usefixtures("poison")

FLOATS = (torch.float32, torch.bfloat16)
on_every_target = pytest.mark.parametrize(
    "target", targets("linear_int8", only=FLOATS), indirect=True
)
SIZES = [(0, 64, 48), (1, 16, 16), (17, 96, 70), (65, 768, 100), (3, 100, 1)]


def random_int8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


@on_every_target
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (63, 96), (64, 1000)], ids=str)
def test_rows_are_rounded_as_numpy_rounds(target: Target, shape: tuple[int, int]) -> None:
    x = Draw(target)(*shape, scale=3.0)
    if len(x):
        x[0] = 3
        x[-1, 0] = 400.0
    q, scale, offset = quantize_rows(x)
    values = x.float().cpu().numpy()
    high, low = np.float32(0.5) * values.max(1), np.float32(0.5) * values.min(1)
    half, middle = high - low, high + low
    with np.errstate(divide="ignore"):
        inverse = np.where(half > 0, np.float32(127) / half, np.float32(0))
    expected = np.clip(np.rint((values - middle[:, None]) * inverse[:, None]), -127, 127)
    assert q.dtype == torch.int8 and scale.dtype == offset.dtype == torch.float32
    assert np.array_equal(q.cpu().numpy(), expected.astype(np.int8))
    np.testing.assert_array_equal(scale.cpu().numpy(), half / np.float32(127))
    np.testing.assert_array_equal(offset.cpu().numpy(), middle)


@on_every_target
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_exact_integers(target: Target, size: tuple[int, int, int]) -> None:
    rows, width, columns = size
    q, weight = random_int8(rows, width), random_int8(columns, width, seed=1)
    q[: rows // 2] = 127  # the largest sums that there are
    weight[: columns // 2] = -127
    sums = q.numpy().astype(np.int32) @ weight.numpy().astype(np.int32).T
    ones = [torch.ones(n, device=target.device) for n in (rows, columns)]
    y = linear_int8(q.to(target.device), ones[0], weight.to(target.device), ones[1])
    assert y.dtype == torch.float32
    assert np.array_equal(y.cpu().numpy(), sums.astype(np.float32))


@on_every_target
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_epilogue(target: Target, activation: str, with_bias: bool) -> None:
    draw = Draw(target)
    q, weight = random_int8(33, 64), random_int8(50, 64, seed=1)
    scale, weight_scale, bias, offset, column_sum = (
        draw(n, scale=s).float()
        for n, s in ((33, 1.0), (50, 1e-4), (50, 1.0), (33, 1.0), (50, 1.0))
    )
    y = linear_int8(
        q.to(target.device), scale, weight.to(target.device), weight_scale,
        bias if with_bias else None, offset=offset, column_sum=column_sum, activation=activation,
        dtype=target.dtype,
    )  # fmt: skip
    exact = q.double() @ weight.double().t()
    exact = exact * scale.double().cpu()[:, None] * weight_scale.double().cpu()
    exact = exact + offset.double().cpu()[:, None] * column_sum.double().cpu()
    exact = exact + bias.double().cpu() if with_bias else exact
    if activation != "none":
        form = "tanh" if activation == "gelu_tanh" else "none"
        exact = F.gelu(exact, approximate=form)
    assert y.dtype == target.dtype
    step = 2e-6 if target.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double().cpu(), exact, rtol=step, atol=step)


@on_every_target
def test_output_in_int8(target: Target) -> None:
    """By a scale known beforehand: what rounds by hand from the output in fp32."""
    draw = Draw(target)
    q, weight = random_int8(33, 64).to(target.device), random_int8(50, 64, seed=1).to(target.device)
    scale, weight_scale, bias = draw(33).float(), draw(50, scale=1e-4).float(), draw(50).float()
    wide = linear_int8(q, scale, weight, weight_scale, bias, activation="gelu")
    step = wide.abs().max()[None] / 150  # some of it out of range
    got = linear_int8(
        q, scale, weight, weight_scale, bias,
        activation="gelu", dtype=target.dtype, output_scale=step,
    )  # fmt: skip
    inverse = np.float32(1) / step.cpu().numpy()
    expected = np.clip(np.rint(wide.cpu().numpy() * inverse), -127, 127)
    assert got.dtype == torch.int8
    np.testing.assert_array_equal(got.cpu().numpy(), expected.astype(np.int8))


@on_every_target
def test_a_linear_through_int8_is_off_by_half_a_step_at_most(target: Target) -> None:
    """|y - y_int8| <= sum_k |x| d_w + |w| d_x + d_x d_w, d half a step of each."""
    draw = Draw(target)
    x, w = draw(40, 96).float() + 1, draw(30, 96).float()
    q, scale, offset = quantize_rows(x)
    w_scale = w.abs().amax(1) / 127
    wq = (w / w_scale[:, None]).round().to(torch.int8)
    sums = column_sums(wq, w_scale)
    torch.testing.assert_close(sums, (wq.double().sum(1) * w_scale.double()).float())
    y = linear_int8(q, scale, wq, w_scale, offset=offset, column_sum=sums)
    step_x, step_w = scale[:, None] / 2, w_scale / 2
    bound = x.abs().sum(1)[:, None] * step_w + w.abs().sum(1) * step_x + 96 * step_x * step_w
    error = (y - x @ w.t()).abs()
    assert (error <= bound * 1.001 + 1e-5).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("q", {"q": torch.ones(3, 8)}),
        ("q", {"q": torch.ones(8, dtype=torch.int8)}),
        ("weight", {"weight": torch.ones(5, 7, dtype=torch.int8)}),
        ("weight", {"weight": torch.ones(5, 8)}),
        ("weight", {"weight": torch.ones(5, 8, dtype=torch.int8, device="meta")}),
        ("scale", {"scale": torch.ones(2)}),
        ("scale", {"scale": torch.ones(3, dtype=torch.bfloat16)}),
        ("weight_scale", {"weight_scale": torch.ones(4)}),
        ("bias", {"bias": torch.ones(5, dtype=torch.float64)}),
        ("column_sum", {"offset": torch.ones(3)}),
        ("offset", {"column_sum": torch.ones(5)}),
        ("offset", {"offset": torch.ones(5), "column_sum": torch.ones(5)}),
        ("column_sum", {"offset": torch.ones(3), "column_sum": torch.ones(3)}),
        ("output_scale", {"output_scale": torch.ones(5)}),
        ("output_scale", {"output_scale": torch.ones(1, dtype=torch.float64)}),
        ("activation", {"activation": "relu"}),
        ("dtype", {"dtype": torch.int32}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "q": torch.ones(3, 8, dtype=torch.int8),
        "scale": torch.ones(3),
        "weight": torch.ones(5, 8, dtype=torch.int8),
        "weight_scale": torch.ones(5),
        "bias": torch.ones(5),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        linear_int8(**(good | arguments))


def test_rows_want_a_float_matrix() -> None:
    for x in (torch.ones(3), torch.ones(3, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="^x: got .*expected"):
            quantize_rows(x)
