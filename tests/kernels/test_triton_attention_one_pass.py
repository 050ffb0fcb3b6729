"""The three ways to compute attention's backward, each forced, against the fp64 formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fastbert.kernels import _attention_config, attention

from ._attention import attention_factors, attention_formula, cu_seqlens_of
from ._parity import (
    BF16,
    DOT_DTYPES,
    FP16,
    FP32,
    INTERPRETED,
    KERNEL_MARKS,
    assert_parity,
    dropout_args,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

each_way = pytest.mark.parametrize("way", attention.BACKWARDS)
LENGTHS = [1, 0, 40, 17]


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences fill several; one-kernel tiles in every dtype."""
    tile = _attention_config.Tile
    tiles = _attention_config.Tiles(tile(32, 16, 4, 2), tile(16, 32, 4, 2), tile(16, 32, 4, 2))
    monkeypatch.setattr(_attention_config, "tiles", lambda *args: tiles)
    monkeypatch.setattr(_attention_config, "bwd_short", lambda *args: tile(64, 16, 4, 2))
    monkeypatch.setattr(_attention_config, "bwd_one_pass", lambda *args: tile(16, 32, 4, 2))


def backward(way, qkv, dout, lengths, p=0.0, max_seqlen=None, bias=None):
    site = (
        cu_seqlens_of(lengths), max_seqlen or max(lengths), qkv.shape[3] ** -0.5, *dropout_args(p)
    )  # fmt: skip
    out, lse = attention.attention_fwd(qkv, *site, bias)
    return attention.BACKWARDS[way](dout, qkv, out, lse, *site, bias)


def check(way, lengths, head_dim, dtype, p, scale=1.0, num_heads=2):
    torch.manual_seed(0)
    qkv = random(sum(lengths), 3, num_heads, head_dim, dtype=dtype, scale=scale)
    dout = random(sum(lengths), num_heads, head_dim, dtype=dtype)
    # Any bound will do as the longest length.
    dqkv = backward(way, qkv, dout, lengths, p, max(lengths) + 3)
    factors = attention_factors(lengths, num_heads, p)
    formula = partial(attention_formula, lengths=lengths, factors=factors)
    assert_parity({"qkv": dqkv}, formula, {"qkv": qkv}, dout)


@kernel_test
@each_way
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("head_dim", [32, 64, 40])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_backward(way, dtype, head_dim, p, small_tiles):
    check(way, LENGTHS, head_dim, dtype, p)


@kernel_test
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [[128, 0, 5], [1, 1, 1]])
@pytest.mark.parametrize("dtype", [FP16] if INTERPRETED else [FP16, BF16])
def test_short_with_the_launch_choices(dtype, lengths, p):
    torch.manual_seed(0)
    qkv, dout = (
        random(sum(lengths), 3, 1, 64, dtype=dtype),
        random(sum(lengths), 1, 64, dtype=dtype),
    )
    dqkv = backward("short", qkv, dout, lengths, p, 128)
    formula = partial(attention_formula, lengths=lengths, factors=attention_factors(lengths, 1, p))
    assert_parity({"qkv": dqkv}, formula, {"qkv": qkv}, dout)


@kernel_test
@each_way
def test_extreme_scores(way, small_tiles):
    check(way, [20, 40], 32, FP32, 0.0, scale=30.0)


@kernel_test
@each_way
def test_keys_past_the_end_do_not_overflow(way, small_tiles):
    """All scores near -1000: a zero score, as those keys have, is an infinite probability."""
    torch.manual_seed(0)
    qkv = random(17, 3, 1, 32)
    qkv[:, 0], qkv[:, 1] = 14.0 + 0.01 * qkv[:, 0], -14.0 + 0.01 * qkv[:, 1]
    dout = random(17, 1, 32)
    dqkv = backward(way, qkv, dout, [17])
    assert_parity({"qkv": dqkv}, partial(attention_formula, lengths=[17]), {"qkv": qkv}, dout)


@kernel_test
@each_way
def test_a_broken_neighbour_does_not_leak(way, small_tiles):
    torch.manual_seed(0)
    qkv, dout = random(60, 3, 2, 32), random(60, 2, 32)
    clean = backward(way, qkv, dout, [20, 40])
    qkv[:20] = float("nan")
    broken = backward(way, qkv, dout, [20, 40])
    assert torch.equal(broken[20:], clean[20:]) and broken[:20].isnan().all()


@kernel_test
def test_the_ways_agree_to_the_last_rounding(small_tiles):
    """The same sums in the same precision: only their order differs."""
    torch.manual_seed(0)
    qkv, dout = random(60, 3, 2, 32), random(60, 2, 32)
    ways = [backward(way, qkv, dout, [20, 40], 0.25) for way in attention.BACKWARDS]
    for other in ways[1:]:
        torch.testing.assert_close(other, ways[0], rtol=1e-5, atol=1e-5)


@kernel_test
@pytest.mark.parametrize("most", [16, 17])
def test_attention_bwd_takes_the_short_way_where_it_can(most, monkeypatch):
    """With 16 queries a tile: 16 tokens take it, 17 do not."""
    tile = _attention_config.Tile(16, 16, 4, 1)
    monkeypatch.setattr(_attention_config, "bwd_short", lambda *args: tile)
    taken = []
    for way in attention.BACKWARDS:
        monkeypatch.setitem(attention.BACKWARDS, way, lambda *args, way=way: taken.append(way))
    qkv = random(16, 3, 1, 16)
    site = (cu_seqlens_of([16]), most, 0.25, *dropout_args(0.0))
    attention.attention_bwd(qkv[:, 0], qkv, qkv[:, 0], random(1, 16), *site)
    assert taken == ["short" if most == 16 else "two_kernels"]


@kernel_test
@pytest.mark.parametrize(
    ("way", "head_dim", "most", "message"),
    [
        ("short", 64, 129, "max_seqlen: got 129, expected at most 128"),
        ("short", 256, 1, "max_seqlen: got 1, expected at most 0"),
        ("one_pass", 128, 1, "qkv: got torch.float16 with head_dim 128, expected 16 bits and 64"),
    ],
)
def test_what_a_way_cannot_serve(way, head_dim, most, message):
    qkv = random(1, 3, 1, head_dim, dtype=FP16)
    site = (cu_seqlens_of([1]), most, 0.25, *dropout_args(0.0))
    with pytest.raises(ValueError, match=message):
        attention.BACKWARDS[way](qkv[:, 0], qkv, qkv[:, 0], random(1, 1), *site)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@kernel_test
@each_way
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_same_inputs_give_the_same_bits(way, p):
    """A hundred times, with every multiprocessor busy: a race would show."""
    if way == "one_pass" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the one-pass backward has no tile here")
    torch.manual_seed(0)
    lengths = [128, 1, 0, 77] * 40 if way == "short" else [512, 1, 0, 300] * 40
    qkv = random(sum(lengths), 3, 12, 64, dtype=BF16)
    dout = random(sum(lengths), 12, 64, dtype=BF16)
    first = backward(way, qkv, dout, lengths, p)
    assert first.isfinite().all()
    for _ in range(100):
        assert torch.equal(first, backward(way, qkv, dout, lengths, p))


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_choices_for_every_device(arch):
    for head_dim in (1, 32, 33, 64, 128, 256):
        for dropout in (False, True):
            call = (head_dim, 2, dropout, arch)
            tile = _attention_config.bwd_short(*call)
            longest = 0 if tile is None else tile.block_m
            assert longest >= 64 or head_dim > 128
            for most, way in ((longest, "short"), (longest + 1, "two_kernels")):
                if most:
                    assert _attention_config.bwd(most, *call) == way
            assert _attention_config.bwd(1, head_dim, 4, dropout, arch) == "two_kernels"
            one_pass = _attention_config.bwd_one_pass(*call)
            assert (one_pass is not None) == (head_dim == 64 and arch[0] in (9, 10))
