"""The attention kernels of fastbert._cpu, called by address: every ISA, dtype and kind of batch.

The oracle is softmax(q k^T) v in fp64, sequence by sequence. Criterion for each tensor:

    err(ours) <= 2 * err(the same mathematics by torch in the dtype under test) + ATOL,

err = max |x - oracle| / max |oracle|.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastbert import _native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ATOL = {torch.float32: 4e-7, torch.bfloat16: 2e-3, torch.float64: 1e-12}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
SEED = 0x1234_5678_9ABC_DEF0
OFFSET = 7
GUARD = 64  # elements in front of and behind each output that must stay as they were


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    head_dim: int


RAGGED = (0, 1, 63, 64, 65, 127, 0, 300)
CASES = (
    Case(RAGGED, 3, 64),
    Case(RAGGED, 12, 32),
    Case(RAGGED, 1, 128),
    Case(RAGGED, 3, 40),
    Case((1000,), 1, 64),
    Case((2, 255, 256, 257, 0), 1, 1),
)


# Other instruction sets share these kernels.
ISAS = [name for name in ("avx512", "avx2", "portable") if name in _native.cpu().available_isas()]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every ISA that this machine has, forced in turn."""
    before = _native.cpu().isa()
    _native.cpu().set_isa(request.param)
    yield request.param
    _native.cpu().set_isa(before)


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(np.cumsum((0, *lengths)), dtype=torch.int32)


class Poisoned:
    """A tensor full of nan between two guards."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._memory = torch.full((int(np.prod(shape)) + 2 * GUARD,), torch.nan, dtype=dtype)
        self.tensor = self._memory[GUARD : self._memory.numel() - GUARD].view(shape)

    def read(self) -> torch.Tensor:
        assert self._memory[:GUARD].isnan().all(), "written in front of the output"
        assert self._memory[-GUARD:].isnan().all(), "written behind the output"
        return self.tensor


class Result(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    dqkv: torch.Tensor


def native(
    qkv: torch.Tensor,
    dout: torch.Tensor,
    lengths: tuple[int, ...],
    p: float = 0.0,
    threads: int = 2,
    scale: float | None = None,
) -> Result:
    """Forward and backward by the kernels, into poisoned outputs."""
    tokens, _, heads, head_dim = qkv.shape
    cu_seqlens = offsets(lengths)
    statistic = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    out = Poisoned((tokens, heads, head_dim), qkv.dtype)
    lse = Poisoned((heads, tokens), statistic)
    dqkv = Poisoned(tuple(qkv.shape), qkv.dtype)
    shape = (
        cu_seqlens.data_ptr(), len(lengths), tokens, heads, head_dim, max(lengths, default=0),
        head_dim**-0.5 if scale is None else scale, p, SEED, OFFSET,
    )  # fmt: skip
    code = CODES[qkv.dtype]
    _native.cpu().attention_fwd(
        qkv.data_ptr(), *shape, out.tensor.data_ptr(), lse.tensor.data_ptr(), code, threads
    )
    _native.cpu().attention_bwd(
        dout.data_ptr(), qkv.data_ptr(), out.tensor.data_ptr(), lse.tensor.data_ptr(), *shape,
        dqkv.tensor.data_ptr(), code, threads,
    )  # fmt: skip
    return Result(out.read(), lse.read(), dqkv.read())


def philox_words(head: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) at broadcast positions, in 64-bit integers."""
    low = np.uint64(0xFFFFFFFF)
    head, row, col = (x.astype(np.uint64) for x in np.broadcast_arrays(head, row, col))
    counter = [col // np.uint64(4), row, np.full_like(col, OFFSET), head]
    key = [np.uint64(SEED) & low, np.uint64(SEED >> 32)]
    for _ in range(10):
        product0 = counter[0] * np.uint64(0xD2511F53)
        product1 = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (product1 >> np.uint64(32)) ^ counter[1] ^ key[0],
            product1 & low,
            (product0 >> np.uint64(32)) ^ counter[3] ^ key[1],
            product0 & low,
        ]
        key = [
            (key[0] + np.uint64(0x9E3779B9)) & low,
            (key[1] + np.uint64(0xBB67AE85)) & low,
        ]
    return np.choose((col % np.uint64(4)).astype(np.int64), counter)


def keep_mask(start: int, length: int, heads: int, p: float) -> torch.Tensor:
    """(N, S, S), true where a probability is kept: row = packed query, column = key position."""
    words = philox_words(
        np.arange(heads)[:, None, None],
        np.arange(start, start + length)[None, :, None],
        np.arange(length)[None, None, :],
    )
    return torch.from_numpy(words >= np.uint64(int(p * 2**32)))


def plain(
    qkv: torch.Tensor,
    dout: torch.Tensor,
    lengths: tuple[int, ...],
    p: float = 0.0,
    scale: float | None = None,
) -> Result:
    """The equation in torch operations of qkv's dtype, backward by autograd."""
    qkv = qkv.detach().requires_grad_()
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    statistic = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    outs, lses = [qkv[:0, 0]], [qkv.new_empty(qkv.shape[2], 0, dtype=statistic)]
    for start, end in pairwise(offsets(lengths).tolist()):
        if start == end:
            continue
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2)) * scale
        kept = scores.softmax(-1)
        if p > 0.0:
            keep = keep_mask(start, end - start, qkv.shape[2], p)
            kept = torch.where(keep, kept / (1.0 - p), torch.zeros_like(kept))
        outs.append((kept @ v).transpose(0, 1))
        lses.append(scores.to(statistic).logsumexp(-1))
    out = torch.cat(outs)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    return Result(out.detach(), torch.cat(lses, 1).detach(), dqkv)


class Expected(NamedTuple):
    qkv: torch.Tensor
    dout: torch.Tensor
    peer: Result
    oracle: Result


@functools.cache
def expected(case: Case, dtype: torch.dtype, p: float) -> Expected:
    """Inputs of a case, and what torch makes of them in dtype and in fp64."""
    tokens = sum(case.lengths)
    random = torch.Generator().manual_seed(tokens + case.head_dim)
    qkv = torch.randn(tokens, 3, *case[1:], generator=random).to(dtype)
    dout = torch.randn(tokens, *case[1:], generator=random).to(dtype)
    return Expected(
        qkv, dout,
        plain(qkv, dout, case.lengths, p),
        plain(qkv.double(), dout.double(), case.lengths, p),
    )  # fmt: skip


def error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    return ((result.double() - oracle).abs().max() / oracle.abs().max()).item()


def check(
    result: Result, peer: Result, oracle: Result, dtype: torch.dtype, largest_score: float = 1.0
) -> None:
    for name, have, other, truth in zip(Result._fields, result, peer, oracle, strict=True):
        atol = ATOL[torch.float32 if name == "lse" and dtype == torch.bfloat16 else dtype]
        if dtype == torch.float64:
            # Here the oracle is no more exact than what is tested: a score of size s is off by
            # a few s * 2^-53 in both, and that much relative error is in exp(s).
            atol = max(atol, 4 * largest_score * 2.0**-53)
        allowed = 2 * error(other, truth) + atol
        assert error(have, truth) <= allowed, f"{name}: {error(have, truth):.3g} > {allowed:.3g}"


def random_batch(
    lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=random)
    dout = torch.randn(sum(lengths), heads, head_dim, generator=random)
    return qkv.to(dtype), dout.to(dtype)


def assert_same_bits(one: Result, other: Result) -> None:
    for name, a, b in zip(Result._fields, one, other, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(isa: str, dtype: torch.dtype, case: Case, p: float) -> None:
    qkv, dout, peer, oracle = expected(case, dtype, p)
    check(native(qkv, dout, case.lengths, p), peer, oracle, dtype)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa: str, dtype: torch.dtype, p: float) -> None:
    lengths = (130, 7, 0, 1, 600)
    batch = random_batch(lengths, 3, 32, dtype)
    one = native(*batch, lengths, p, threads=1)
    for threads in (2, 3, 8):
        assert_same_bits(native(*batch, lengths, p, threads=threads), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_neighbours_in_the_batch_change_no_bit(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    lengths = (5, 64, 0, 513, 1, 300)
    qkv, dout = random_batch(lengths, 2, head_dim, dtype)
    together = native(qkv, dout, lengths)
    for start, end in pairwise(offsets(lengths).tolist()):
        alone = native(qkv[start:end], dout[start:end], (end - start,))
        assert_same_bits(
            alone,
            Result(together.out[start:end], together.lse[:, start:end], together.dqkv[start:end]),
        )


def test_nan_stays_in_its_sequence_and_head(isa: str) -> None:
    lengths = (20, 70, 33)
    qkv, dout = random_batch(lengths, 2, 64, torch.float32)
    qkv[25, 1, 1, 3] = torch.nan  # a key of the second sequence, second head
    result = native(qkv, dout, lengths)
    assert result.out[20:90, 1].isnan().all() and result.lse[1, 20:90].isnan().all()
    assert result.dqkv[20:90, 0, 1].isnan().all()
    result.out[20:90, 1] = result.lse[1, 20:90] = result.dqkv[20:90, :, 1] = 0.0
    assert not any(x.isnan().any() for x in result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_extreme_scores(isa: str, dtype: torch.dtype, magnitude: float) -> None:
    lengths = (3, 90, 300)
    qkv, dout = random_batch(lengths, 2, 32, dtype)
    # |s| = |q . k| / sqrt(32) reaches the magnitude and p is nearly one-hot (nearly uniform).
    qkv[:, :2] *= magnitude**0.5 / 2
    result = native(qkv, dout, lengths)
    peer = plain(qkv, dout, lengths)
    oracle = plain(qkv.double(), dout.double(), lengths)
    if magnitude > 1.0:
        assert oracle.lse.max() > magnitude / 2
    check(result, peer, oracle, dtype, largest_score=magnitude)


def test_negative_and_zero_scale(isa: str) -> None:
    lengths = (17, 80)
    qkv, dout = random_batch(lengths, 2, 32, torch.float64)
    for scale in (-0.5, 0.0):
        oracle = plain(qkv, dout, lengths, scale=scale)
        for result, truth in zip(native(qkv, dout, lengths, scale=scale), oracle, strict=True):
            torch.testing.assert_close(result, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_token_returns_its_value(isa: str, dtype: torch.dtype) -> None:
    qkv, dout = random_batch((1, 1, 1), 3, 40, dtype)
    result = native(qkv, dout, (1, 1, 1))
    assert torch.equal(result.out, qkv[:, 2])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_tokens(isa: str, lengths: tuple[int, ...]) -> None:
    result = native(*random_batch(lengths, 2, 64, torch.float32), lengths)
    assert [x.numel() for x in result] == [0, 0, 0]


def test_a_long_sequence(isa: str) -> None:
    case = Case((4099, 3), 1, 32)
    qkv, dout, peer, oracle = expected(case, torch.float32, 0.0)
    check(native(qkv, dout, case.lengths), peer, oracle, torch.float32)


def test_the_dropped_share_is_p() -> None:
    kept = keep_mask(0, 512, 2, 0.1).double().mean().item()
    assert abs(kept - 0.9) < 0.002
