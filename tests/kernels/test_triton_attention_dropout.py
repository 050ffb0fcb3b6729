"""Attention's dropout from the packed mask: the bits of Philox, and what the kernels make of it."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastbert import ops
from fastbert.kernels import _attention_config, _attention_dropout, attention
from fastbert.packed import PackedBatch

from ._attention import cu_seqlens_of
from ._parity import (
    DEVICE,
    DOT_DTYPES,
    FP16,
    FP32,
    KERNEL_MARKS,
    SEED,
    SITE,
    dropout_args,
    in_the_first_process,
    kernel_test,
    philox_words,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

LENGTHS = [1, 0, 40, 17]
HEADS, P = 2, 0.25
BENCH = Path(__file__).parents[2] / "bench"


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


def mask_of(lengths):
    """Made for a bound that is not the longest length."""
    sizes = (max(lengths) + 3, sum(lengths), HEADS)
    return _attention_dropout.dropout_mask(cu_seqlens_of(lengths), *sizes, *dropout_args(P))


@kernel_test
@pytest.mark.parametrize("lengths", [LENGTHS, [130]])
def test_the_mask_holds_the_bits_of_philox(lengths):
    mask = mask_of(lengths)
    width = 4 if lengths is LENGTHS else 8
    assert mask.shape == (HEADS, sum(lengths), width) and mask.dtype == torch.int32
    words = mask.cpu().numpy().view(np.uint32)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).reshape(*words.shape[:2], -1)
    first = 0
    for length in lengths:
        rows, keys = first + np.arange(length)[None, :, None], np.arange(length)
        drawn = philox_words(SEED, SITE, np.arange(HEADS)[:, None, None], rows, keys)
        expected = drawn >= np.uint32(int(P * 2.0**32))
        assert (bits[:, first : first + length, :length] == expected).all()
        first += length


def set_tiles(monkeypatch, keys):
    """Tiles of so many keys, fewer than a word has bits or several words."""
    tile = _attention_config.Tile
    query, key = tile(32, keys, 4, 2), tile(16, keys, 4, 2)
    monkeypatch.setattr(
        _attention_config,
        "tiles",
        lambda *args: _attention_config.Tiles(query, query, key),
    )
    monkeypatch.setattr(_attention_config, "bwd_short", lambda *args: tile(64, keys, 4, 2))
    monkeypatch.setattr(_attention_config, "bwd_one_pass", lambda *args: key)


def both_halves(qkv, dout, lengths, way, bias, mask):
    most, scale = max(lengths) + 3, qkv.shape[3] ** -0.5
    site = (cu_seqlens_of(lengths), most, scale, *dropout_args(P), bias, mask)
    out, lse = attention.forward(qkv, *site)
    return out, lse, attention.BACKWARDS[way](dout, qkv, out, lse, *site)


@kernel_test
@pytest.mark.parametrize("way", attention.BACKWARDS)
@pytest.mark.parametrize(
    ("dtype", "keys", "with_bias"),
    [*((dtype, 32, False) for dtype in DOT_DTYPES), (FP16, 16, False), (FP16, 64, True)],
)
def test_the_results_are_those_of_philox_in_the_kernel(dtype, keys, with_bias, way, monkeypatch):
    """To the last bit; what the mask holds past a sequence's end is poison."""
    set_tiles(monkeypatch, keys)
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    qkv, dout = random(tokens, 3, HEADS, 32, dtype=dtype), random(tokens, HEADS, 32, dtype=dtype)
    bias = random(1, tokens, max(LENGTHS) + 3) if with_bias else None
    drawn = both_halves(qkv, dout, LENGTHS, way, bias, None)
    read = both_halves(qkv, dout, LENGTHS, way, bias, mask_of(LENGTHS))
    undropped = attention.attention_fwd(
        qkv, cu_seqlens_of(LENGTHS), max(LENGTHS), 32**-0.5, *dropout_args(0.0), bias
    )
    assert not torch.equal(drawn[0], undropped[0])
    for ours, theirs in zip(read, drawn, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)


@kernel_test
@pytest.mark.parametrize("choice", ["philox", "mask"])
def test_the_choice_is_the_launchers_own(choice, monkeypatch):
    """Each half makes the mask where the choice takes it and no one brings one; never for p = 0."""
    made = []
    make = _attention_dropout.dropout_mask
    monkeypatch.setattr(
        _attention_dropout, "dropout_mask", lambda *args: made.append(make(*args)) or made[-1]
    )
    torch.manual_seed(0)
    qkv, dout = random(20, 3, HEADS, 32).half(), random(20, HEADS, 32).half()
    cu_seqlens = cu_seqlens_of([5, 15])

    def halves(p, qkv=qkv, dout=dout):
        site = (cu_seqlens, 15, 0.2, *dropout_args(p))
        out, lse = attention.attention_fwd(qkv, *site)
        return out, attention.attention_bwd(dout, qkv, out, lse, *site)

    expected = halves(P)
    assert made == []  # nobody has measured that it pays
    monkeypatch.setattr(_attention_config, "dropout", lambda: choice)
    for ours, theirs in zip(halves(P), expected, strict=True):
        assert torch.equal(ours, theirs)
    halves(0.0)
    halves(P, qkv.float(), dout.float())
    assert len(made) == (2 if choice == "mask" else 0)


@kernel_test
def test_no_tokens():
    mask = _attention_dropout.dropout_mask(cu_seqlens_of([0, 0]), 0, 0, HEADS, *dropout_args(P))
    assert mask.shape[:2] == (HEADS, 0) and mask.device.type == DEVICE
    qkv = random(0, 3, HEADS, 32, dtype=FP32)
    site = (cu_seqlens_of([0, 0]), 0, 0.2, *dropout_args(P), None, mask)
    assert attention.forward(qkv, *site)[0].shape == (0, HEADS, 32)


@kernel_test
@pytest.mark.parametrize("half", ["fwd", "bwd", "fwd-bwd"])
def test_the_benchs_candidate(half, monkeypatch):
    """By the mask what ours gives, made once in a forward, never in a backward alone."""
    monkeypatch.syspath_prepend(str(BENCH))
    cases, problem = (importlib.import_module(name) for name in ("cases_attention", "problem"))
    made = []
    make = _attention_dropout.dropout_mask
    monkeypatch.setattr(
        _attention_dropout, "dropout_mask", lambda *args: made.append(1) or make(*args)
    )
    torch.manual_seed(0)
    batch = PackedBatch.from_flat(torch.zeros(20, dtype=torch.int64, device=DEVICE), [5, 15])
    qkv, dout = random(20, 3, HEADS, 32).requires_grad_(), random(20, HEADS, 32)
    p, seed, _ = dropout_args(P)
    by_mask = cases._by_mask(batch, qkv, dout, half, p, seed)
    made_before = len(made)

    def ours(x):
        return ops.attention(x, batch.cu_seqlens, 15, dropout_p=p, dropout_seed=seed)[0]

    with ops.use_backend("triton"):
        drawn = problem.half_of(half, ours, [qkv], dout)
        assert cases._same(by_mask, drawn).over_bound == 0.0
    assert (made_before, len(made)) == ((1, 1) if half == "bwd" else (0, 1))


@pytest.mark.parametrize("arch", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_masks_tiles_serve_the_same_lengths(arch):
    """With the same queries and keys a step in every sum of many: the same bits."""
    for head_dim in (32, 64, 128):
        for itemsize in (2, 4):
            call = (head_dim, itemsize, True, arch)
            drawn = _attention_config.tiles(*call)
            read = _attention_config.tiles(*call, False, True)
            assert [tile[:3] for tile in read] == [tile[:3] for tile in drawn]
            shorts = [_attention_config.bwd_short(*call, False, mask) for mask in (False, True)]
            assert len({tile and tile.block_m for tile in shorts}) == 1
            ways = {_attention_config.bwd(64, *call, False, mask) for mask in (False, True)}
            assert len(ways) == 1
