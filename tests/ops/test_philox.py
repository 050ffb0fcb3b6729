"""The dropout stream: Philox4x32-10, and the mask that every op on every backend makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastbert.ops import add_layer_norm, attention, embed_layer_norm, philox

from ._masks import attention_masks, drop, hidden_mask, seed_tensor
from ._targets import Draw, Target, targets

on_float32_targets = {
    op: pytest.mark.parametrize("target", targets(op, only=(torch.float32,)), indirect=True)
    for op in ("attention", "add_layer_norm", "embed_layer_norm")
}
# Seeds of both signs and beyond 32 bits; the first and the last offset.
STREAMS = [(0, 0), (12345, 1), (2**32, 0), (-1, 2**32 - 1), (-(2**63), 77), (2**63 - 1, 2**31)]


def philox4x32(counter: tuple[int, ...], key: tuple[int, int], rounds: int = 10) -> list[int]:
    """One block of Philox4x32 (Salmon et al., SC 2011, section 3.3) in numpy's wide integers."""
    c = np.array(counter, dtype=np.uint64)
    k = np.array(key, dtype=np.uint64)
    low_word = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        high0, low0 = product0 >> np.uint64(32), product0 & low_word
        high1, low1 = product1 >> np.uint64(32), product1 & low_word
        c = np.array([high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0], dtype=np.uint64)
        k = (k + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low_word
    return c.tolist()


# From the file kat_vectors of Random123: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def int64(low: int, high: int) -> int:
    return int(np.array([low, high], dtype=np.uint32).view(np.int64)[0])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    group, row, offset, plane = hexadecimal(counter)
    assert philox4x32((group, row, offset, plane), hexadecimal(key)) == hexadecimal(expected)
    words = philox.words(
        seed_tensor(int64(*hexadecimal(key))),
        offset,
        torch.tensor(plane),
        torch.tensor(row),
        4 * group + torch.arange(4),
    )
    assert words.tolist() == hexadecimal(expected)


@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_words_are_those_of_an_independent_philox(seed: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(1)
    plane, row, col = (
        torch.randint(bound, (50,), generator=generator) for bound in (64, 2**32, 2**17)
    )
    key = np.array([seed], dtype=np.int64).view(np.uint32).tolist()
    expected = [
        philox4x32((c // 4, r, offset, p), key)[c % 4]
        for p, r, c in zip(plane.tolist(), row.tolist(), col.tolist(), strict=True)
    ]
    assert philox.words(seed_tensor(seed), offset, plane, row, col).tolist() == expected


def test_threshold() -> None:
    """Kept from floor(p 2^32) on: p = 2^-32 drops the word 0 alone, of which there is none here."""
    row, col = torch.arange(100)[:, None], torch.arange(100)
    words = philox.words(seed_tensor(3), 4, torch.zeros_like(row), row, col)
    for p in (2.0**-32, 0.1, 0.5, 0.999, 1 - 2.0**-32):
        keep = philox.keep_mask(seed_tensor(3), 4, p, torch.zeros_like(row), row, col)
        assert torch.equal(keep, words >= math.floor(p * 2**32))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_rate(seed: int, offset: int, p: float) -> None:
    """Within 4.5 standard deviations of a binomial, over all and over any row or column."""
    keep = hidden_mask(300, 300, p, seed, offset)
    for kept in (keep.flatten()[None], keep, keep.t()):
        count = kept.shape[1]
        bound = 4.5 * math.sqrt(count * p * (1 - p)) + 1
        assert (kept.sum(1) - count * (1 - p)).abs().max() <= bound


def test_streams_differ() -> None:
    """By seed, offset, plane and row: two unrelated masks of p = 1/2 agree in half their places."""
    row, col = torch.arange(64)[:, None], torch.arange(64)

    def mask(seed: int = 1, offset: int = 0, plane: int = 0, shift: int = 0) -> torch.Tensor:
        planes = torch.full_like(row, plane)
        return philox.keep_mask(seed_tensor(seed), offset, 0.5, planes, row + shift, col)

    variants = [mask(seed=2), mask(seed=2**32 + 1), mask(offset=1), mask(plane=1), mask(shift=64)]
    for other in variants:
        assert abs((other == mask()).float().mean() - 0.5) < 4.5 * 0.5 / 64


def test_kept_values_are_divided_by_the_chance_to_keep() -> None:
    x = torch.randn(50, 20, dtype=torch.float64)
    keep = hidden_mask(50, 20, 0.3, 8, 9)
    result = philox.dropout(x, 0.3, seed_tensor(8), 9)
    torch.testing.assert_close(result, drop(x, keep, 0.3), rtol=1e-15, atol=0)
    assert philox.dropout(x, 0.0, None, 0) is x


# ------------------------------------------------------------------- the masks of the backends


@on_float32_targets["add_layer_norm"]
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_mask_of_add_layer_norm(target: Target, seed: int, offset: int, p: float) -> None:
    """dx is 0 exactly where an element was dropped; forward dropped those and no others."""
    draw = Draw(target)
    x, residual = draw(65, 101).requires_grad_(), draw(65, 101, scale=1e-3)
    ones, zeros = torch.ones(101, device=target.device), torch.zeros(101, device=target.device)
    keep = hidden_mask(65, 101, p, seed, offset, target.device)
    y = add_layer_norm(
        x, residual, ones, zeros,
        dropout_p=p, dropout_seed=seed_tensor(seed, target.device), dropout_offset=offset,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y, x, draw(65, 101))
    assert torch.equal(dx != 0, keep)
    if p < 0.5:
        # Dropped elements equal the residual, a thousandth of a kept one, and y tells them apart.
        z = residual + drop(x.detach(), keep, p)
        expected = torch.nn.functional.layer_norm(z, (101,), eps=1e-12)
        torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-5)


@on_float32_targets["embed_layer_norm"]
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_mask_of_embed_layer_norm(target: Target, seed: int, offset: int) -> None:
    draw = Draw(target)
    ids, table = draw.ids(50, 65), draw(50, 101)
    ones, zeros = torch.ones(101, device=target.device), torch.zeros(101, device=target.device)
    y = embed_layer_norm(
        ids, ids, None, table, draw(50, 101), None, ones, zeros,
        dropout_p=0.3, dropout_seed=seed_tensor(seed, target.device), dropout_offset=offset,
    )  # fmt: skip
    assert torch.equal(y != 0, hidden_mask(65, 101, 0.3, seed, offset, target.device))


@on_float32_targets["attention"]
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
@pytest.mark.parametrize("lengths", [(70, 0, 1, 59), (300,)], ids=str)
def test_mask_of_attention(
    target: Target, lengths: tuple[int, ...], seed: int, offset: int
) -> None:
    """With q = k = 0 all probabilities are 1/S; with v_j = e_j out shows which were kept."""
    heads, p, tokens, dim = 2, 0.3, sum(lengths), 64
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(target.device, torch.int32)
    masks = attention_masks(lengths, heads, p, seed, offset, target.device)
    for first_key in range(0, max(lengths), dim):
        qkv = torch.zeros(tokens, 3, heads, dim, device=target.device)
        start = 0
        for length in lengths:
            columns = torch.arange(max(0, min(dim, length - first_key)), device=target.device)
            qkv[start + first_key + columns, 2, :, columns] = 1
            start += length
        out, _ = attention(
            qkv, cu_seqlens, max(lengths),
            dropout_p=p, dropout_seed=seed_tensor(seed, target.device), dropout_offset=offset,
        )  # fmt: skip
        for rows, mask in zip(out.split(lengths), masks, strict=True):
            expected = mask[:, :, first_key : first_key + dim].transpose(0, 1)
            assert torch.equal(rows[..., : expected.shape[2]] != 0, expected)
