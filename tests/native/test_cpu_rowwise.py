"""The row-wise C++ kernels, called through their launchers, on every ISA that this machine has.

The criterion is the project's: with err(a) = max |a - oracle| / max |oracle|, the oracle being the
formula below in fp64,  err(kernel) <= 2 err(the formula in torch, same dtype) + ATOL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbert import _native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

from fastbert.ops import _cpp

from ._isas import isa  # noqa: F401

ATOL = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 1e-3}
# (activations, vectors)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
TOKENS = (0, 1, 63, 64, 65, 127, 1000)
SHAPES = [*((t, 96) for t in TOKENS), (65, 64), (65, 768), (65, 1000), (5, 7)]
P = 0.3

every_dtype = pytest.mark.parametrize(
    ("dtype", "vector_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
every_shape = pytest.mark.parametrize(("rows", "cols"), SHAPES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More only cost time here: test_cpu_native.py shows that results do not depend on them."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (and the largest ints): what a kernel leaves unwritten is seen."""
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(former)


# ------------------------------------------------------------------------------------- the oracle


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of counters (..., 4)."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


@functools.lru_cache(64)
def multipliers(rows: int, cols: int, p: float, seed: int, offset: int) -> torch.Tensor:
    """The factors (0 or 1 / (1 - p)) of hidden dropout, (rows, cols) in fp64."""
    if p == 0.0:
        return torch.ones(rows, cols, dtype=torch.float64)
    counter = np.zeros((rows, (cols + 3) // 4, 4), np.uint32)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.arange(rows)[:, None]
    counter[..., 2] = offset
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    keep = words.reshape(rows, 4 * words.shape[1])[:, :cols] >= np.uint32(int(p * 2**32))
    return torch.from_numpy(keep / (1.0 - p))


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers that bf16 holds exactly, so that every dtype starts from the same inputs."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().to(dtype)


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64)


def error(a: torch.Tensor, oracle: torch.Tensor) -> float:
    if oracle.numel() == 0:
        return 0.0
    return ((a.double() - oracle).abs().max() / oracle.abs().max().clamp_min(1e-300)).item()


def check(
    ours: dict[str, torch.Tensor | None],
    formula: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor | None],
    dy: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """``ours``: "y" and gradients by the names of ``inputs``; ``formula(**inputs)`` gives y."""

    def run(to: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {
            k: None if v is None else v.detach().to(to, copy=True).requires_grad_()
            for k, v in inputs.items()
        }
        y = formula(**leaves)
        if dy is not None and y.requires_grad:
            y.backward(dy.to(to))
        grads = {k: v.grad for k, v in leaves.items() if v is not None and v.grad is not None}
        return {"y": y.detach(), **grads}

    oracle, peer = run(torch.float64), run(dtype)
    for name, value in ours.items():
        if value is None:
            continue
        assert value.shape == oracle[name].shape, name
        bound = 2 * error(peer[name], oracle[name]) + ATOL[value.dtype]
        assert error(value, oracle[name]) <= bound, (name, bound)


# ---------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_of_this_file_gives_the_published_words(counter: str, key: str, words: str) -> None:
    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    k0, k1 = parse(key)
    assert philox(np.array(parse(counter)), (k0, k1)).tolist() == parse(words)


@pytest.mark.parametrize("seed", [0, 1234567890123456789, -2])
@pytest.mark.parametrize(("p", "offset"), [(0.1, 0), (0.5, 7), (0.999, 2**32 - 1), (1e-9, 3)])
@pytest.mark.parametrize(("rows", "cols"), [(1000, 96), (3, 1000), (70, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_masks_are_philox(
    dtype: torch.dtype, rows: int, cols: int, p: float, offset: int, seed: int
) -> None:
    ones, zeros = torch.ones(rows, cols, dtype=dtype), torch.zeros(cols, dtype=dtype)
    _, z, _, _ = _cpp.add_layer_norm_fwd(
        ones, None, None, zeros, zeros, 1e-12, p, seed_tensor(seed), offset, True
    )
    assert torch.equal(z, multipliers(rows, cols, p, seed, offset).to(dtype))


# -------------------------------------------------------------------------------------- bias_gelu


@every_dtype
@every_shape
@pytest.mark.parametrize("tanh", [False, True])
def test_bias_gelu(
    dtype: torch.dtype, vector_dtype: torch.dtype, rows: int, cols: int, tanh: bool
) -> None:
    x, dy = randn(rows, cols, dtype=dtype, scale=2), randn(rows, cols, dtype=dtype, seed=1)
    bias = None if cols == 64 else randn(cols, dtype=vector_dtype, seed=2)

    def formula(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.gelu(x if bias is None else x + bias, approximate="tanh" if tanh else "none")

    y = _cpp.bias_gelu_fwd(x, bias, tanh)
    dx, dbias = _cpp.bias_gelu_bwd(dy, x, bias, tanh)
    assert (dbias is None) == (bias is None)
    assert dbias is None or dbias.dtype == vector_dtype
    ours = {"y": y, "x": dx, "bias": dbias}
    check(ours, formula, {"x": x, "bias": bias}, dy, dtype)


def test_gelu_keeps_its_digits_in_the_negative_tail() -> None:
    x = torch.linspace(-9, 9, 200_001)[None]
    u = x.double()
    oracles = (0.5 * u * torch.erfc(-u * 0.5**0.5),
               u * torch.sigmoid((8 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))  # fmt: skip
    for tanh, oracle in zip((False, True), oracles, strict=True):
        ours = _cpp.bias_gelu_fwd(x, None, tanh).double()
        seen = oracle.abs() > 1e-36  # smaller results are flushed to 0
        relative = ((ours - oracle).abs() / oracle.abs())[seen]
        assert relative.max() < 2e-5  # of exp(-u^2 / 2): its argument is rounded
        assert relative[(x.abs() < 2)[seen]].max() < 1e-6


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gelu_of_extreme_values(dtype: torch.dtype, tanh: bool) -> None:
    values = [0.0, -0.0, 1e-30, -1e-30, 13.0, -13.4, -50.0, 100.0, 1e18, -1e18, 3e38, -3e38]
    x = torch.tensor([values], dtype=dtype)
    y = _cpp.bias_gelu_fwd(x, None, tanh)
    dx, _ = _cpp.bias_gelu_bwd(torch.ones_like(x), x, None, tanh)
    torch.testing.assert_close(
        y, F.gelu(x.double(), approximate="tanh" if tanh else "none").to(dtype)
    )
    slope = torch.where(x.abs() < 1e-6, 0.5, (x > 0).double()).to(dtype)
    torch.testing.assert_close(dx, slope, atol=1e-6, rtol=1e-5)
    x = torch.tensor([[torch.nan, 1.0]], dtype=dtype)
    assert _cpp.bias_gelu_fwd(x, None, tanh).isnan().tolist() == [[True, False]]


# --------------------------------------------------------------------------------- add_layer_norm


def layer_norm_formula(p: float, seed: int, offset: int) -> Callable[..., torch.Tensor]:
    def formula(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        x_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        z = x if x_bias is None else x + x_bias
        z = z * multipliers(*x.shape, p, seed, offset).to(x.dtype)
        z = z if residual is None else z + residual
        return F.layer_norm(z, x.shape[1:], weight, bias, 1e-12)

    return formula


@every_dtype
@every_shape
@pytest.mark.parametrize("p", [0.0, P])
def test_add_layer_norm(
    dtype: torch.dtype, vector_dtype: torch.dtype, rows: int, cols: int, p: float
) -> None:
    x, residual, dy = (randn(rows, cols, dtype=dtype, seed=i) for i in range(3))
    x_bias, weight, bias = (randn(cols, dtype=vector_dtype, seed=i) for i in range(3, 6))
    inputs = {"x": x, "residual": residual, "x_bias": x_bias, "weight": weight, "bias": bias}
    if cols == 64:
        inputs |= {"residual": None, "x_bias": None}
    site = (p, seed_tensor(5), 11)
    y, z, mean, rstd = _cpp.add_layer_norm_fwd(*inputs.values(), 1e-12, *site, True)
    bare = _cpp.add_layer_norm_fwd(*inputs.values(), 1e-12, *site, False)
    assert torch.equal(bare[0], y)
    assert bare[1:] == (None, None, None)
    dz, dx, dweight, dbias, dx_bias = _cpp.add_layer_norm_bwd(
        dy, z, weight, mean, rstd, *site, inputs["x_bias"] is not None
    )
    assert (dx is dz) == (p == 0.0)
    assert (dx_bias is None) == (inputs["x_bias"] is None)
    assert dweight.dtype == dbias.dtype == vector_dtype
    ours = {"y": y, "x": dx, "weight": dweight, "bias": dbias, "x_bias": dx_bias}
    if inputs["residual"] is not None:
        ours["residual"] = dz
    check(ours, layer_norm_formula(p, 5, 11), inputs, dy, dtype)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e15])
def test_add_layer_norm_of_extreme_magnitudes(scale: float) -> None:
    x = randn(64, 768, dtype=torch.float32) * scale + scale  # a mean as large as the spread
    weight, bias = torch.ones(768), torch.zeros(768)
    y, *_ = _cpp.add_layer_norm_fwd(x, None, None, weight, bias, 1e-12, 0.0, None, 0, False)
    formula = layer_norm_formula(0.0, 0, 0)
    inputs = {"x": x, "residual": None, "x_bias": None, "weight": weight, "bias": bias}
    check({"y": y}, formula, inputs, None, torch.float32)


def test_layer_norm_of_a_constant_row_is_its_bias() -> None:
    x, bias = torch.full((3, 1000), 7.25), randn(1000, dtype=torch.float32)
    y, *_ = _cpp.add_layer_norm_fwd(x, None, None, bias, bias, 1e-12, 0.0, None, 0, False)
    assert torch.equal(y, bias.expand(3, -1))


# ------------------------------------------------------------------------------- embed_layer_norm


def embed_inputs(
    rows: int, cols: int, dtype: torch.dtype, vector_dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    ids = [torch.randint(bound, (rows,), generator=generator) for bound in (200, 70, 2)]
    tables = {
        "word": randn(211, cols, dtype=dtype),  # rows 200 … 210 are never hit
        "position": randn(70, cols, dtype=dtype, seed=1),
        "token_type": randn(2, cols, dtype=dtype, seed=2),
        "weight": randn(cols, dtype=vector_dtype, seed=3),
        "bias": randn(cols, dtype=vector_dtype, seed=4),
    }
    return ids, tables


@every_dtype
@every_shape
@pytest.mark.parametrize("p", [0.0, P])
def test_embed_layer_norm(
    dtype: torch.dtype, vector_dtype: torch.dtype, rows: int, cols: int, p: float
) -> None:
    ids, inputs = embed_inputs(rows, cols, dtype, vector_dtype)
    if cols == 64:
        ids[2] = inputs["token_type"] = None

    def formula(word, position, token_type, weight, bias):  # type: ignore[no-untyped-def]
        e = word[ids[0]] + position[ids[1]]
        e = e if token_type is None else e + token_type[ids[2]]
        keep = multipliers(rows, cols, p, 5, 11).to(e.dtype)
        return F.layer_norm(e, (cols,), weight, bias, 1e-12) * keep

    site = (p, seed_tensor(5), 11)
    y, mean, rstd = _cpp.embed_layer_norm_fwd(*ids, *inputs.values(), 1e-12, *site)
    dy = randn(rows, cols, dtype=dtype, seed=9)
    tables = list(inputs.values())[:3]
    grads = _cpp.embed_layer_norm_bwd(dy, *ids, *tables, inputs["weight"], mean, rstd, *site)
    assert (grads[2] is None) == (cols == 64)
    assert not grads[0][200:].any()
    assert grads[3].dtype == grads[4].dtype == vector_dtype
    ours = {"y": y, **dict(zip(inputs, grads, strict=True))}
    check(ours, formula, inputs, dy, dtype)


# ----------------------------------------------------------------------------- cross_entropy_rows


@every_dtype
@pytest.mark.parametrize(
    ("rows", "classes"), [(0, 96), (1, 64), (65, 1000), (17, 30522), (127, 2), (5, 1)]
)
def test_cross_entropy_rows(
    dtype: torch.dtype, vector_dtype: torch.dtype, rows: int, classes: int
) -> None:
    wide = randn(rows, classes + 3, dtype=dtype, scale=4)
    logits, beside = wide[:, :classes], wide[:, classes:].clone()  # rows farther apart than long
    bias = None if classes == 64 else randn(classes, dtype=vector_dtype, seed=1)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    scale = torch.full((1,), 0.37)

    def run(to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.detach().to(to, copy=True).requires_grad_()
        u = leaf if bias is None else leaf + bias.to(to)
        loss = F.cross_entropy(u, labels, reduction="none")
        loss.backward(torch.full_like(loss, scale.item()))
        return loss.detach(), leaf.grad

    oracle, peer = run(torch.float64), run(dtype)
    untouched = wide.clone()
    plain = _cpp.cross_entropy_rows(logits, bias, labels, -100, None)
    assert torch.equal(wide, untouched)
    loss = _cpp.cross_entropy_rows(logits, bias, labels, -100, scale)
    assert torch.equal(plain, loss)
    assert torch.equal(wide[:, classes:], beside)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ours, torchs, exact in zip((loss, logits), peer, oracle, strict=True):
        assert error(ours, exact) <= 2 * error(torchs, exact) + ATOL[dtype]
    assert not loss[::3].any()
    assert not logits[::3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_extreme_logits(dtype: torch.dtype) -> None:
    infinite = -torch.inf
    logits = torch.tensor(
        [[3e38, -3e38, 0.0], [-1e30, -1e30, -1e30], [infinite, 1.0, infinite], [90.0, 0.0, -90.0],
         [torch.nan, 0.0, 0.0], [infinite] * 3], dtype=dtype,
    )  # fmt: skip
    # More than a block of columns before the first finite logit.
    logits = torch.cat([torch.full((6, 5000), infinite, dtype=dtype), logits], dim=1)
    labels = torch.tensor([5000, 5001, 5001, 5001, 5001, 5001])
    leaf = logits.clone().double().requires_grad_()
    expected = F.cross_entropy(leaf, labels, reduction="none")
    expected.sum().backward()
    loss = _cpp.cross_entropy_rows(logits, None, labels, -100, torch.ones(1))
    torch.testing.assert_close(loss, expected.to(dtype), equal_nan=True)
    torch.testing.assert_close(logits[:4], leaf.grad[:4].to(dtype), atol=1e-30, rtol=1e-5)
    assert logits[4:].isnan().all()


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@every_shape
def test_gather_and_scatter_rows(dtype: torch.dtype, rows: int, cols: int) -> None:
    x = randn(rows, cols, dtype=dtype)
    for index in (torch.arange(rows), torch.arange(rows)[1::3], torch.arange(0)):
        gathered = _cpp.gather_rows(x, index)
        assert torch.equal(gathered, x[index])
        scattered = _cpp.scatter_rows(gathered, index, rows)
        assert torch.equal(scattered, torch.zeros_like(x).index_copy(0, index, gathered))
