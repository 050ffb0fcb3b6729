"""The Linear kernels of the CPU engine, on every ISA that this machine has, against numpy.

int8 sums are integers and must be exact; what follows them in fp32 (scales, bias, activation) is
compared to within a few roundings. (AMX on emulated tiles: test_cpu_linear_units.py.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from fastbert import _native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

native = _native.cpu()

Array = npt.NDArray
Float = np.float32
ROWS = (0, 1, 2, 5, 6, 7, 16, 17, 64, 129)
# (in, out): whole pieces and words, and what is left over of each
SHAPES = ((768, 128), (1, 1), (3, 65), (64, 64), (129, 63), (770, 200), (3072, 64), (0, 70))
EPS = 2.0**-24


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    former = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(former)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(linear, x: Array, threads: int = 1, residual: Array | None = None, columns=None) -> Array:
    """linear's output, NaN where it wrote nothing."""
    out = np.full((len(x), linear.out_features), np.nan, Float)
    linear.run(np.ascontiguousarray(x), out, threads, residual, columns)
    return out


def int8_linear(w: Array, activation: str = "none", *, scale=1.0, bias=None, fixed=1.0):
    w_scale = np.full(len(w), scale, Float) if np.isscalar(scale) else scale
    x_scale = None if fixed is None else np.full(1, fixed, Float)
    return native.Linear(w, w_scale, bias, x_scale, activation)


def quantized(x: Array, fixed: float | None = None) -> tuple[Array, Array, Array]:
    """The definition: int8 rows, their scales and their offsets."""
    if fixed is None:
        high, low = Float(0.5) * x.max(axis=1), Float(0.5) * x.min(axis=1)
        half, offset = high - low, high + low
        scale = half / Float(127)
        with np.errstate(divide="ignore"):
            inverse = np.where(half > 0, Float(127) / half, Float(0))
    else:
        scale, inverse = np.full(len(x), fixed, Float), np.full(len(x), 1 / Float(fixed), Float)
        offset = np.zeros(len(x), Float)
    steps = (x - offset[:, None]) * inverse[:, None]
    return np.clip(np.rint(steps), -127, 127).astype(np.int8), scale, offset


def bf16(x: Array) -> Array:
    """x rounded towards zero to what bf16 holds."""
    return (np.ascontiguousarray(x, Float).view(np.uint32) & 0xFFFF0000).view(Float)


# ------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_sums_are_exact(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    w = rng(k, n).integers(-127, 128, (n, k), np.int8)
    linear = int8_linear(w)
    assert linear.isa == isa
    for rows in ROWS:
        x = rng(rows, k).integers(-127, 128, (rows, k)).astype(Float)
        expected = (x.astype(np.int64) @ w.T.astype(np.int64)).astype(Float)
        np.testing.assert_array_equal(run(linear, x), expected)


@pytest.mark.parametrize("k", [4, 767, 3072])
def test_int8_sums_of_extremes_are_exact(isa: str, k: int) -> None:
    """Pairs of ±127 · ±127 are what saturates 16 bits, and 3072 of them what fp32 cannot count."""
    signs = np.sign(rng(k).standard_normal((4, k)))
    rows = np.concatenate([np.ones((1, k)), -np.ones((1, k)), np.zeros((1, k)), signs]) * 127
    w = np.concatenate([rows] * 10)[:65].astype(np.int8)
    expected = rows.astype(np.int64) @ w.T.astype(np.int64)
    assert k < 3072 or np.abs(expected).max() > 2**24
    np.testing.assert_array_equal(run(int8_linear(w), rows.astype(Float)), expected.astype(Float))


@pytest.mark.parametrize("sigma", [10, 28, 36, 60])
@pytest.mark.parametrize("shape", [(769, 130), (64, 64), (3, 17)], ids=str)
def test_int8_sums_of_bell_shaped_weights_are_exact(
    isa: str, sigma: int, shape: tuple[int, int]
) -> None:
    """What linear_pairs.h expects: few pairs of weights could saturate, some, or most."""
    k, n = shape
    w = rng(k, sigma).standard_normal((n, k)) * sigma
    w = np.rint(w).clip(-127, 127).astype(np.int8)
    w[: n // 2, k // 2 :][:, :2] = 127
    random = rng(sigma).integers(-127, 128, (7, k))
    x = np.concatenate([random, np.full((1, k), 127), np.full((1, k), -127), 127 * np.sign(w[:3])])
    expected = x.astype(np.int64) @ w.T.astype(np.int64)
    np.testing.assert_array_equal(run(int8_linear(w), x.astype(Float)), expected.astype(Float))


@pytest.mark.parametrize("fixed", [None, 0.02])
def test_int8_with_scales_and_bias(isa: str, fixed: float | None) -> None:
    random = rng(1)
    x = random.standard_normal((37, 300), Float) * random.lognormal(0, 2, (37, 1)).astype(Float)
    w = random.integers(-127, 128, (130, 300), np.int8)
    w_scale, bias = random.random(130, Float), random.standard_normal(130, Float)
    q, x_scale, offset = quantized(x, fixed)
    sums = q.astype(np.int64) @ w.T.astype(np.int64)
    factor = x_scale[:, None] * w_scale
    got = run(int8_linear(w, scale=w_scale, fixed=fixed, bias=bias), x)
    product = sums * factor.astype(np.float64)
    shift = offset[:, None].astype(np.float64) * (w_scale * w.sum(1, dtype=np.int64))
    assert fixed is not None or np.abs(shift).max() > 1
    terms = np.abs(product) + np.abs(shift) + np.abs(bias)
    assert np.all(np.abs(got - (product + shift + bias)) <= 4 * EPS * terms)
    if fixed is not None:
        got = run(int8_linear(w, scale=w_scale, fixed=fixed), x)
        np.testing.assert_array_equal(got, sums.astype(Float) * factor)


# --------------------------------------------------------------------------------- quantize_rows


def quantize_rows(x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
    out = np.full(x.shape, 99, np.int8)
    scales, offsets = np.full((2, len(x)), -1, Float)
    native.quantize_rows(x, out, scales, offsets, threads)
    return out, scales, offsets


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 63, 64, 65, 768, 1000])
def test_quantize_rows_is_its_definition(isa: str, k: int) -> None:
    random = rng(k)
    x = random.standard_normal((67, k), Float) * random.lognormal(0, 20, (67, 1)).astype(Float)
    x[1] = 0
    x[2] = random.integers(-127, 127, k) + Float(0.5) * (random.random(k) < 0.5)  # ties
    x[2, 0], x[2, -1] = 127, -127
    x[3] = np.abs(x[3])  # 0 is not among them
    x[4] = -3
    expected = quantized(x)
    for threads in (1, 3):
        for got, wanted in zip(quantize_rows(x, threads), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_the_step_is_that_of_the_range_of_a_row(isa: str) -> None:
    x = np.array([[-1, 0, 9, 0.5], [-4, 4, 2, 0], [5, 5, 5, 5], [3e38, -3e38, 0, 1]], Float)
    q, scales, offsets = quantize_rows(x)
    np.testing.assert_allclose(scales, [5 / 127, 4 / 127, 0, 3e38 / 127], rtol=1e-7)
    np.testing.assert_array_equal(offsets, [4, 0, 5, 0])
    np.testing.assert_array_equal(q[:, :2], [[-127, -102], [-127, 127], [0, 0], [127, -127]])
    error = np.abs(q * scales[:, None].astype(np.float64) + offsets[:, None] - x)
    assert np.all(error <= scales[:, None] * 0.50001)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fixed", [None, 0.5])
def test_rows_that_are_not_finite_give_nan(isa: str, bad: float, fixed: float | None) -> None:
    for k in (1, 65, 300):
        for column in {0, k // 2, k - 1}:
            x = rng(k).standard_normal((9, k), Float)
            good = run(int8_linear(np.ones((70, k), np.int8), fixed=fixed), x)
            x[4, column] = bad
            got = run(int8_linear(np.ones((70, k), np.int8), fixed=fixed), x)
            assert np.isnan(got[4]).all()
            np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(good, 4, 0))
            q, scales, _ = quantize_rows(x)
            assert np.isnan(scales[4])
            assert not q[4].any()


def test_rows_too_close_to_divide_by_their_range_count_as_their_middle(isa: str) -> None:
    x = np.array([[1e-38, -1e-38, 0], [0, 0, 0], [1e-36, 6e-37, -1e-36]], Float)
    q, scales, offsets = quantize_rows(x)
    np.testing.assert_array_equal(q, [[0, 0, 0], [0, 0, 0], [127, 76, -127]])
    np.testing.assert_array_equal(scales, np.abs(x).max(axis=1) / Float(127))
    np.testing.assert_array_equal(offsets, [0, 0, 0])


# ------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_against_fp64(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    w = bf16(rng(k, n).standard_normal((n, k)))
    bias = rng(n).standard_normal(n, Float)
    as_bits = native.Linear((w.view(np.uint32) >> 16).astype(np.uint16), None, bias, None, "none")
    as_float = native.Linear(w, None, bias, None, "none")
    for rows in ROWS:
        x = rng(rows, k).standard_normal((rows, k), Float)
        if isa == "amx":  # which rounds activations
            x = bf16(x)
        terms = np.abs(x).astype(np.float64) @ np.abs(w.T) + np.abs(bias)
        expected = x.astype(np.float64) @ w.T + bias
        got = run(as_bits, x)
        assert np.all(np.abs(got - expected) <= 4 * EPS * math.sqrt(k + 1) * terms)
        np.testing.assert_array_equal(run(as_float, x), got)


def test_float_weights_are_rounded_to_the_nearest_bf16(isa: str) -> None:
    ulp = 2.0**-7
    w = np.array([[1, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + ulp * 0.51, np.inf, np.nan]], Float).T
    got = run(
        native.Linear(np.ascontiguousarray(w), None, None, None, "none"), np.ones((1, 1), Float)
    )
    np.testing.assert_array_equal(got, [[1, 1, 1 + 2 * ulp, 1 + ulp, np.inf, np.nan]])


# ------------------------------------------------------------- activations, residuals, partitions


def gelu(u: Array) -> Array:
    return np.vectorize(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)))(u)


def sigmoid(u: Array) -> Array:
    return np.where(u < 0, np.exp(np.minimum(u, 0)), 1) / (1 + np.exp(-np.abs(u)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda u: u,
    "gelu": gelu,
    "gelu_tanh": lambda u: u * sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)),
    "relu": lambda u: np.maximum(u, 0),
    "silu": lambda u: u * sigmoid(u),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_activations_and_residual(isa: str, activation: str, kind: str) -> None:
    """Of sums that are exact, so that only the activation is measured."""
    pre = np.concatenate([np.linspace(-20, 20, 1000), np.geomspace(1e-6, 2, 250)])
    pre = np.concatenate([pre, -pre[1000:], [0, 50, -50, 100, -100]]).astype(Float)
    if kind == "int8":
        linear = int8_linear(np.zeros((len(pre), 8), np.int8), activation, bias=pre)
    else:
        linear = native.Linear(np.zeros((len(pre), 8), Float), None, pre, None, activation)
    x = rng(0).standard_normal((3, 8), Float)
    expected = ACTIVATIONS[activation](pre.astype(np.float64))
    got = run(linear, x)
    assert np.array_equal(got[0], got[1]) and np.array_equal(got[0], got[2])
    assert np.all(np.abs(got[0] - expected) <= 8 * EPS * np.abs(expected) + 1e-7)
    residual = rng(1).standard_normal((3, len(pre)), Float)
    total = run(linear, x, 1, residual)
    assert np.all(np.abs(total - (got + residual)) <= 2 * EPS * (np.abs(got) + np.abs(residual)))
    linear.run(x, residual, 1, residual)
    np.testing.assert_array_equal(residual, total)


def test_tanh_keeps_the_digits_of_small_arguments(isa: str) -> None:
    pre = np.geomspace(1e-30, 1, 500, dtype=Float)
    got = run(
        native.Linear(np.zeros((500, 1), Float), None, pre, None, "tanh"), np.ones((1, 1), Float)
    )
    expected = np.tanh(pre.astype(np.float64))
    assert np.all(np.abs(got[0] - expected) <= 4 * EPS * expected)


def random_linear(kind: str, n: int, k: int):
    random = rng(n, k)
    bias = random.standard_normal(n, Float)
    if kind == "bf16":
        return native.Linear(random.standard_normal((n, k), Float), None, bias, None, "gelu")
    w = random.integers(-127, 128, (n, k), np.int8)
    return int8_linear(w, "gelu", scale=random.random(n, Float) / k, bias=bias, fixed=None)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_an_element_depends_on_its_row_and_column_only(isa: str, kind: str) -> None:
    linear = random_linear(kind, 600, 330)
    x, residual = (
        rng(0).standard_normal((301, 330), Float),
        rng(1).standard_normal((301, 600), Float),
    )
    whole = run(linear, x, 1, residual)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(run(linear, x, threads, residual), whole)
    for first, last in [(0, 1), (1, 8), (8, 21), (21, 85), (85, 301)]:
        got = run(linear, x[first:last], 1, residual[first:last])
        np.testing.assert_array_equal(got, whole[first:last])
    for first, last in [(0, 64), (64, 320), (320, 600), (576, 600), (128, 128)]:
        got = run(linear, x, 2, residual, (first, last))
        np.testing.assert_array_equal(got[:, first:last], whole[:, first:last])
        assert np.isnan(np.delete(got, np.s_[first:last], 1)).all()


def test_units_agree_on_int8() -> None:
    x = rng(3).standard_normal((20, 500), Float)
    former, results = native.isa(), []
    for name in native.available_isas():
        native.set_isa(name)
        results.append(run(random_linear("int8", 130, 500), x))
    native.set_isa(former)
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-6, atol=1e-6)


def test_a_linear_keeps_its_isa() -> None:
    former = native.isa()
    linear = random_linear("int8", 70, 50)
    x = rng(0).standard_normal((9, 50), Float)
    expected = run(linear, x)
    native.set_isa("portable")
    assert linear.isa == former
    np.testing.assert_array_equal(run(linear, x), expected)
    native.set_isa(former)


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": np.ones(3, np.int8)}, r"weight: got 1 dimensions"),
        ({"weight": np.ones((2, 3))}, r"weight: got float64 of shape \(2, 3\)"),
        ({"weight": np.ones((3, 2), np.int8).T}, r"weight: got int8"),
        ({"weight_scale": None}, r"weight_scale: got None"),
        ({"weight_scale": np.ones(3, Float)}, r"weight_scale: got float32 of shape \(3,\).*\(2,\)"),
        ({"weight": np.ones((2, 3), Float)}, r"got scales, expected None with float32 weights"),
        ({"bias": np.ones(2)}, r"bias: got float64"),
        ({"input_scale": np.zeros(1, Float)}, r"input_scale: got 0.0"),
        ({"input_scale": np.full(1, np.nan, Float)}, r"input_scale: got nan"),
        ({"activation": "swish"}, r"activation: got 'swish', expected none, gelu"),
    ],
)
def test_bad_linear(changed: dict, message: str) -> None:
    arguments = {"weight": np.ones((2, 3), np.int8), "weight_scale": np.ones(2, Float)}
    arguments |= {"bias": None, "input_scale": None, "activation": "none"}
    with pytest.raises(ValueError, match=message):
        native.Linear(**(arguments | changed))


def test_bad_calls() -> None:
    linear = int8_linear(np.ones((70, 3), np.int8))
    x, out = np.ones((4, 3), Float), np.ones((4, 70), Float)
    with pytest.raises(ValueError, match=r"x: got float32 of shape \(4, 2\)"):
        linear.run(np.ones((4, 2), Float), out, 1)
    with pytest.raises(ValueError, match=r"out: got float32 of shape \(4, 69\)"):
        linear.run(x, np.ones((4, 69), Float), 1)
    with pytest.raises(ValueError, match="num_threads: got 0"):
        linear.run(x, out, 0)
    for columns in [(1, 70), (0, 65), (64, 0), (-64, 64), (0, 128)]:
        with pytest.raises(ValueError, match="columns: got"):
            linear.run(x, out, 1, None, columns)
    with pytest.raises(ValueError, match="scales: got None"):
        native.quantize_rows(x, np.ones((4, 3), np.int8), None, np.ones(4, Float), 1)
