"""The launchers of the cuda backend against the formulas: the same checks emulated and on a GPU.

``launch`` is the module of launchers; ``place`` brings an input tensor to where its kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from . import formulas

Tensor = torch.Tensor
Place = Callable[[Tensor], Tensor]

SEED = -0x1234567_89ABCDEF  # both halves of the key in use, the sign too
OFFSET = 0xFFFFFFF5
EPS = 1e-5


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills empty tensors with NaN: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(name: str, got: Tensor, want: Tensor, floor: float = 4e-6) -> None:
    """|got - want| <= eps |want| + floor max |want|: the rounding of the result, and of its making
    (``floor``: a few roundings of fp32 unless told otherwise)."""
    eps = torch.finfo(got.dtype).eps
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if got.numel() == 0:
        return
    error = (got - want).abs()
    bound = eps * want.abs() + floor * want.abs().max() + 1e-30
    wrong = ~(error <= bound)  # true for NaN
    at = int((error / bound).nan_to_num(torch.inf).argmax())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {got.numel()} wrong, worst at {at}: "
        f"{got.reshape(-1)[at]}, not {want.reshape(-1)[at]}"
    )


def _randn(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _seed(p: float, place: Place) -> Tensor | None:
    return place(torch.tensor([SEED])) if p > 0.0 else None


def attention(
    launch: ModuleType, place: Place, lengths: list[int], heads: int, head_dim: int,
    dtype: torch.dtype, *, p: float = 0.0, scale: float | None = None, slack: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``slack``: how much max_seqlen exceeds the longest sequence."""
    scale = head_dim**-0.5 if scale is None else scale
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    qkv = _randn(_generator(), sum(lengths), 3, heads, head_dim, dtype=dtype)
    longest = max(lengths, default=0) + slack
    with poisoned():
        out, lse = launch.attention_fwd(
            place(qkv), place(bounds.int()), longest, scale, p, _seed(p, place), OFFSET
        )
    want, want_lse = formulas.attention(qkv, bounds.tolist(), scale, p, SEED, OFFSET)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Probabilities are rounded to 16 bits, so the error is relative to the largest value.
    floor = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_close("out", out, want, floor)
    assert_close("lse", lse, want_lse)
    return out, lse


def attention_bwd(
    launch: ModuleType, place: Place, lengths: list[int], heads: int, head_dim: int,
    dtype: torch.dtype, *, p: float = 0.0, scale: float | None = None, slack: int = 0,
) -> Tensor:  # fmt: skip
    """``slack``: how much max_seqlen exceeds the longest sequence."""
    scale = head_dim**-0.5 if scale is None else scale
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    qkv = _randn(_generator(), sum(lengths), 3, heads, head_dim, dtype=dtype)
    return attention_bwd_of(launch, place, qkv, bounds, scale, p, slack)


def attention_bwd_of(
    launch: ModuleType, place: Place, qkv: Tensor, bounds: list[int], scale: float, p: float,
    slack: int,
) -> Tensor:  # fmt: skip
    """``bounds``: cu_seqlens."""
    dtype = qkv.dtype
    dout = _randn(torch.Generator().manual_seed(8), *qkv[:, 0].shape, dtype=dtype)
    out, lse = formulas.attention(qkv, bounds, scale, p, SEED, OFFSET)
    out, lse = out.to(dtype), lse.float()
    longest = max((b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)), default=0)
    with poisoned():
        dqkv = launch.attention_bwd(
            place(dout), place(qkv), place(out), place(lse), place(torch.tensor(bounds).int()),
            longest + slack, scale, p, _seed(p, place), OFFSET,
        )  # fmt: skip
    want = formulas.attention_bwd(dout, qkv, out, bounds, scale, p, SEED, OFFSET)
    assert dqkv.dtype == dtype
    # p and ds are rounded to 16 bits, so the error is relative to the largest value.
    floor = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for which, name in enumerate(("dq", "dk", "dv")):
        assert_close(name, dqkv[:, which], want[:, which], floor)
    return dqkv


def bias_gelu(
    launch: ModuleType, place: Place, rows: int, cols: int, dtype: torch.dtype,
    vector_dtype: torch.dtype | None, tanh: bool,
) -> None:  # fmt: skip
    """``vector_dtype`` None: without a bias."""
    generator = _generator()
    x = 2 * _randn(generator, rows, cols, dtype=dtype)
    dy = _randn(generator, rows, cols, dtype=dtype)
    bias = None if vector_dtype is None else _randn(generator, cols, dtype=vector_dtype)
    placed_x, placed_bias = place(x), None if bias is None else place(bias)
    with poisoned():
        y = launch.bias_gelu_fwd(placed_x, placed_bias, tanh)
        dx, dbias = launch.bias_gelu_bwd(place(dy), placed_x, placed_bias, tanh)

    exact_x = x.double().requires_grad_()
    want = formulas.bias_gelu(exact_x, None if bias is None else bias.double(), tanh)
    (want_dx,) = torch.autograd.grad(want, exact_x, dy.double())
    assert y.dtype == dx.dtype == dtype
    assert_close("y", y, want.detach())
    assert_close("dx", dx, want_dx)
    if bias is None:
        assert dbias is None
    else:
        assert dbias.dtype == vector_dtype
        assert_close("dbias", dbias, want_dx.sum(0))


def add_layer_norm(
    launch: ModuleType, place: Place, rows: int, cols: int, dtype: torch.dtype,
    vector_dtype: torch.dtype, *, p: float = 0.0, residual: bool = True, x_bias: bool = True,
    mean: float = 0.0,
) -> None:  # fmt: skip
    """``mean``: added to every x; large, it is the undoing of a one-pass variance."""
    generator = _generator()
    x = _randn(generator, rows, cols, dtype=dtype) + mean
    other = _randn(generator, rows, cols, dtype=dtype) if residual else None
    dy = _randn(generator, rows, cols, dtype=dtype)
    weight, bias, added = (_randn(generator, cols, dtype=vector_dtype) for _ in range(3))
    seed = _seed(p, place)
    inputs = (
        place(x), None if other is None else place(other), place(added) if x_bias else None,
        place(weight), place(bias), EPS, p, seed, OFFSET,
    )  # fmt: skip
    with poisoned():
        y, z, row_mean, rstd = launch.add_layer_norm_fwd(*inputs, True)
        unsaved = launch.add_layer_norm_fwd(*inputs, False)
    assert y.dtype == z.dtype == dtype and row_mean.dtype == rstd.dtype == torch.float32
    assert torch.equal(unsaved[0], y) and unsaved[1:] == (None, None, None)

    exact = [None if v is None else v.double() for v in (x, other, added if x_bias else None)]
    assert_close("z", z, formulas.residual_sum(*exact, p, SEED, OFFSET))
    # From here on from the z that the kernel rounded, as the contract has it.
    z = z.cpu()
    want, want_mean, want_rstd = formulas.layer_norm(
        z.double(), weight.double(), bias.double(), EPS
    )
    # y subtracts the mean, which makes z's rounding in fp32 count for more.
    assert_close("y", y, want, 4e-6 * max(1.0, abs(mean)))
    assert_close("mean", row_mean, want_mean)
    assert_close("rstd", rstd, want_rstd)

    with poisoned():
        dz, dx, dweight, dbias, dx_bias = launch.add_layer_norm_bwd(
            place(dy), place(z), inputs[3], row_mean, rstd, p, seed, OFFSET, x_bias
        )
    want_dz, want_dweight, want_dbias = formulas.layer_norm_bwd(
        dy.double(), z.double(), weight.double(), EPS
    )
    want_dx = want_dz
    if p > 0.0:
        want_dx = want_dz * formulas.hidden_mask(p, SEED, OFFSET, rows, cols)
    else:
        assert dx is dz
    floor = 4e-6 * max(1.0, abs(mean))
    assert_close("dz", dz, want_dz, floor)
    assert_close("dx", dx, want_dx, floor)
    assert dweight.dtype == dbias.dtype == vector_dtype
    assert_close("dweight", dweight, want_dweight, floor)
    assert_close("dbias", dbias, want_dbias)
    if x_bias:
        # Kernels for wide rows add the dx that they read back, rounded.
        assert dx_bias.dtype == vector_dtype
        assert_close("dx_bias", dx_bias, want_dx.sum(0), max(floor, torch.finfo(dtype).eps))
    else:
        assert dx_bias is None


def embed_layer_norm(
    launch: ModuleType, place: Place, rows: int, cols: int, dtype: torch.dtype,
    vector_dtype: torch.dtype, *, p: float = 0.0, entries: tuple[int, int, int] = (97, 33, 2),
    ids: str = "random",
) -> tuple[Tensor, ...]:  # fmt: skip
    """``entries``: rows of the tables word, position, token type; 0 of the last leaves it out.
    ``ids``: random; same, all of them the last; outside, every third one beyond its table."""
    generator = _generator()
    sizes = [n for n in entries if n > 0]
    tables = [_randn(generator, n, cols, dtype=dtype) for n in sizes]
    chosen = [torch.randint(n, (rows,), generator=generator) for n in sizes]
    for i, n in zip(chosen, sizes, strict=True):
        if ids == "same":
            i.fill_(n - 1)
        elif ids == "outside":
            i[::3] = torch.tensor([-1, n, -(2**40), 2**40]).repeat(rows)[: len(i[::3])]
    dy = _randn(generator, rows, cols, dtype=dtype)
    weight, bias = (_randn(generator, cols, dtype=vector_dtype) for _ in range(2))
    none = (None,) * (3 - len(sizes))
    placed = (*map(place, chosen), *none, *map(place, tables), *none, place(weight))
    dropout = (p, _seed(p, place), OFFSET)
    with poisoned():
        y, mean, rstd = launch.embed_layer_norm_fwd(*placed, place(bias), EPS, *dropout)
        grads = launch.embed_layer_norm_bwd(place(dy), *placed, mean, rstd, *dropout)

    exact = [t.double().requires_grad_() for t in (*tables, weight, bias)]
    mask = formulas.hidden_mask(p, SEED, OFFSET, rows, cols) if p > 0.0 else 1.0
    want, want_mean, want_rstd = formulas.embed_layer_norm(
        (*chosen, *none), (*exact[:-2], *none), *exact[-2:], EPS, mask
    )
    assert y.dtype == dtype and mean.dtype == rstd.dtype == torch.float32
    assert_close("y", y, want.detach())
    assert_close("mean", mean, want_mean.detach())
    assert_close("rstd", rstd, want_rstd.detach())
    wants = torch.autograd.grad(want, exact, dy.double())
    names = ["dword", "dposition", *["dtoken_type"] * len(sizes[2:]), "dweight", "dbias"]
    found = [g for g in grads if g is not None]
    assert len(grads) == 5 and (grads[2] is None) == (not sizes[2:])
    for name, got, like, exactly in zip(names, found, (*tables, weight, bias), wants, strict=True):
        assert got.dtype == like.dtype
        # Sums of gradients that were rounded to the activations' dtype.
        floor = 4e-6 if name in ("dweight", "dbias") else max(4e-6, torch.finfo(dtype).eps)
        assert_close(name, got, exactly, floor)
    return (y, mean, rstd, *found)
