"""Attention's tiles, longest sequence first: the list, and the same bits as in any other order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import _attention_config, attention
from fastbert.kernels._attention_tile_list import WHOLE_SEQUENCE, tile_list

from ._attention import cu_seqlens_of
from ._parity import (
    BF16,
    FP16,
    INTERPRETED,
    KERNEL_MARKS,
    dropout_args,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

LENGTHS = [1, 17, 0, 40, 17]


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


def listed(lengths, block):
    """Every (first token, end, tile), longest sequence first."""
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # a stable sort
    tiles = [range(-(-lengths[i] // block)) for i in order]
    return [
        [firsts[i], firsts[i] + lengths[i], t]
        for i, of in zip(order, tiles, strict=True)
        for t in of
    ]


@kernel_test
@pytest.mark.parametrize("step", [16, 64])  # sequences a program
@pytest.mark.parametrize("block", [16, 128, WHOLE_SEQUENCE])
@pytest.mark.parametrize(
    "lengths", [[7], [5, 5, 5], [0, 0], LENGTHS, [*range(50), *range(60)], [300] * 3]
)
@pytest.mark.parametrize("padding", [0, 500])  # tokens that are in no sequence
def test_tile_list(lengths, block, step, padding, monkeypatch):
    monkeypatch.setattr(_attention_config, "TILE_LIST_BLOCK", step)
    found = tile_list(cu_seqlens_of(lengths), sum(lengths) + padding, block)
    expected = listed(lengths, block)
    assert found[: len(expected)].tolist() == expected
    left_over = found[len(expected) :]
    assert not left_over.any() and len(left_over) <= len(lengths) + padding // block


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences fill several; one-kernel tiles for every call."""
    tile = _attention_config.Tile
    tiles = _attention_config.Tiles(tile(32, 16, 4, 2), tile(16, 32, 4, 2), tile(16, 32, 4, 2))
    monkeypatch.setattr(_attention_config, "tiles", lambda *args: tiles)
    monkeypatch.setattr(_attention_config, "bwd_short", lambda *args: tile(128, 16, 4, 2))
    monkeypatch.setattr(_attention_config, "bwd_one_pass", lambda *args: tile(16, 32, 4, 2))


def both_orders(way, lengths, head_dim, dtype, p, bias=None, padding=0):
    """(out, lse, dqkv) of the tokens in sequences, as these come and longest first."""
    num_tokens = sum(lengths) + padding
    qkv, dout = (
        random(num_tokens, *shape, head_dim, dtype=dtype) for shape in ((3, 2), (2,))
    )  # fmt: skip
    site = (cu_seqlens_of(lengths), max(lengths), head_dim**-0.5, *dropout_args(p), bias, None)
    for longest_first in (False, True):
        out, lse = attention.forward(qkv, *site, longest_first)
        dqkv = attention.BACKWARDS[way](dout, qkv, out, lse, *site, longest_first)
        yield out[: sum(lengths)], lse[:, : sum(lengths)], dqkv[: sum(lengths)]


@kernel_test
@pytest.mark.parametrize("way", attention.BACKWARDS)
@pytest.mark.parametrize(("p", "biased"), [(0.0, False), (0.25, True)])
def test_the_order_changes_no_bit(way, p, biased, small_tiles):
    torch.manual_seed(0)
    bias = random(2, sum(LENGTHS) + 100, max(LENGTHS)) if biased else None
    given, ordered = both_orders(way, LENGTHS, 32, FP16, p, bias, padding=100)
    for name, x, y in zip(("out", "lse", "dqkv"), given, ordered, strict=True):
        assert x.isfinite().all() and torch.equal(x, y), name


@pytest.mark.skipif(INTERPRETED, reason="for the launch choices, at a size of theirs")
@kernel_test
@pytest.mark.parametrize("way", ["two_kernels", "one_pass"])
def test_the_order_changes_no_bit_at_scale(way):
    if way == "one_pass" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the one-pass backward has no tile here")
    torch.manual_seed(0)
    lengths = torch.randint(0, 513, (256,)).tolist()
    given, ordered = both_orders(way, lengths, 64, BF16, 0.1)
    assert all(map(torch.equal, given, ordered))


@kernel_test
@pytest.mark.parametrize("chosen", [False, True])
def test_attention_takes_the_order_that_is_chosen(chosen, small_tiles, monkeypatch):
    """By the kernels' own grids: a list has no second dimension."""
    asked = []
    monkeypatch.setattr(
        _attention_config, "longest_first", lambda *sizes: asked.append(sizes) or chosen
    )
    from fastbert.kernels import _attention

    found = []
    tiling = _attention.tiling

    def spy(*args):
        found.append(tiling(*args))
        return found[-1]

    monkeypatch.setattr(_attention, "tiling", spy)
    monkeypatch.setattr(_attention_config, "bwd", lambda *args: "two_kernels")
    qkv, dout = random(90, 3, 2, 32), random(90, 2, 32)
    site = (cu_seqlens_of([20, 70]), 75, 0.25, *dropout_args(0.0))
    out, lse = attention.attention_fwd(qkv, *site)
    attention.attention_bwd(dout, qkv, out, lse, *site)
    assert asked == [(90, 2, 75, 4)] * 2
    assert [place.tile_list is not None for place in found] == [chosen] * 3


def test_the_choice():
    """The list is for lengths that differ by more than a tile, and not for little work."""
    choice = _attention_config.longest_first
    assert choice(16 * 1024, 64, 512, 2)
    assert not choice(16 * 1024, 64, 512, 4)  # tiles of few queries
    assert not choice(64 * 512, 64, 512, 2)  # all alike
    assert not choice(64 * 460, 64, 512, 2)  # nearly
    assert not choice(64 * 64, 64, 128, 2)  # a tile each
    assert not choice(1024, 8, 512, 2)  # little work
    assert choice(4096, 16, 512, 2)
