"""The Triton feed-forward halves against fp64 formulas: by plain pointers and by descriptors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastbert.kernels import _config, feed_forward

from ._parity import (
    DEVICE,
    DOT_DTYPES,
    FP16,
    FP32,
    INTERPRETED,
    KERNEL_MARKS,
    assert_parity,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

DTYPES_16 = [dtype for dtype in DOT_DTYPES if dtype != FP32]
HOPPER = (9, 0)


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


@pytest.fixture(params=[(1, False), (1, True), (2, True), (4, True), (8, True)], ids=str)
def small_tiles(request, monkeypatch):
    """Tiles so small that every size fills several, and fewer programs than tiles."""
    parts, descriptors = request.param
    if (
        descriptors
        and not INTERPRETED
        and _config.capability(torch.empty(0, device=DEVICE)) < HOPPER
    ):
        pytest.skip("the copy engine comes with sm_90")
    tile = _config.FeedForwardTile(64, 128, 32, 4, 2, parts, descriptors)
    monkeypatch.setattr(_config, "feed_forward", lambda *args: tile)
    monkeypatch.setattr(_config, "persistent_programs", lambda tiles, arch: min(tiles, 3))


def gelu(pre, b1, tanh):
    return F.gelu(pre if b1 is None else pre + b1, approximate="tanh" if tanh else "none")


def example(size, dtype, bias_dtype):
    tokens, hidden, inner = size
    torch.manual_seed(0)
    x, w1 = random(tokens, hidden, dtype=dtype), random(inner, hidden, dtype=dtype, scale=0.2)
    w2 = random(hidden, inner, dtype=dtype, scale=0.2)
    b1 = None if bias_dtype is None else random(inner, dtype=bias_dtype)
    return x, w1, b1, w2, random(tokens, hidden, dtype=dtype)


def check(size, dtype, bias_dtype, tanh):
    x, w1, b1, w2, dy = example(size, dtype, bias_dtype)
    y, pre = feed_forward.feed_forward_fwd(x, w1, b1, tanh, True)
    alone, nothing = feed_forward.feed_forward_fwd(x, w1, b1, tanh, False)
    assert nothing is None and torch.equal(alone, y)
    ones = torch.ones_like(y)

    def up(x, w1, b1):
        return gelu(x @ w1.t(), b1, tanh)

    assert_parity({"out": y}, up, {"x": x, "w1": w1, "b1": b1}, ones)
    assert_parity({"out": pre}, lambda x, w1: x @ w1.t(), {"x": x, "w1": w1}, ones)

    def down(pre, b1, w2):
        """Its gradients by pre and b1 are the backward half."""
        return gelu(pre, b1, tanh) @ w2.t()

    dpre, db1, again = feed_forward.feed_forward_bwd(dy, w2, pre, b1, tanh, True)
    ours = {"pre": dpre}
    if b1 is None:
        assert db1 is None
    else:
        assert db1.dtype == b1.dtype
        ours["b1"] = db1
    assert_parity(ours, down, {"pre": pre, "b1": b1, "w2": w2}, dy)
    assert_parity({"out": again}, partial(gelu, tanh=tanh), {"pre": pre, "b1": b1}, ones)
    without = feed_forward.feed_forward_bwd(dy, w2, pre, b1, tanh, False)
    assert without[2] is None and torch.equal(without[0], dpre)
    assert b1 is None or torch.equal(without[1], db1)


# (T, H, I): edges in every dimension, a part of a tile wholly past the edge, one row.
SIZES = [(1, 32, 128), (130, 72, 200), (64, 96, 264), (200, 40, 8)]


@kernel_test
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES_16)
def test_parity(size, dtype, small_tiles):
    check(size, dtype, dtype, False)


@kernel_test
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, FP32])
def test_bias_is_optional_or_fp32(bias_dtype, tanh, small_tiles):
    check((70, 40, 136), FP16, bias_dtype, tanh)


@kernel_test
@pytest.mark.parametrize("arch", [(8, 0), HOPPER, (10, 0)])
def test_the_launch_choices(arch, monkeypatch):
    if not INTERPRETED and _config.capability(torch.empty(0, device=DEVICE)) != arch:
        pytest.skip("the choices are those of another GPU")
    monkeypatch.setattr(_config, "capability", lambda x: arch)
    check((150, 72, 320), FP16, FP16, False)


@kernel_test
def test_no_tokens():
    x, w1, b1, w2, dy = example((0, 32, 64), FP16, FP16)
    y, pre = feed_forward.feed_forward_fwd(x, w1, b1, False, True)
    dpre, db1, again = feed_forward.feed_forward_bwd(dy, w2, pre, b1, False, True)
    assert y.shape == pre.shape == dpre.shape == again.shape == (0, 64)
    assert (db1 == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@kernel_test
def test_same_inputs_give_the_same_bits():
    x, w1, b1, w2, dy = example((1000, 768, 3072), FP16, FP16)

    def run():
        y, pre = feed_forward.feed_forward_fwd(x, w1, b1, False, True)
        return [y, pre, *feed_forward.feed_forward_bwd(dy, w2, pre, b1, False, True)]

    first = run()
    for _ in range(100):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("half", ["fwd", "bwd"])
def test_tiles_for_every_device(arch, half):
    tile = _config.feed_forward(half, arch)
    sizes = (*tile[:5], tile.parts)
    assert all(n > 0 and n & (n - 1) == 0 for n in sizes)
    assert tile.block_n // tile.parts >= 16
    assert tile.descriptors == (arch[0] in (9, 10))
    for tiles in (1, 5, 10_000):
        assert 1 <= _config.persistent_programs(tiles, arch) <= tiles
