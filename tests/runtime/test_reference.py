"""The engine in numpy: beside the native one, and in its place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastbert import _native
from fastbert.runtime import Encoder, engine
from fastbert.runtime.engine import Engine, Tokens
from fastbert.runtime.folder import read
from fastbert.runtime.reference import ReferenceEngine, erf, linear, quantize_rows

needs_native = pytest.mark.skipif(
    _native.cpu_reason() is not None, reason=str(_native.cpu_reason())
)


def test_erf() -> None:
    x = np.linspace(-6, 6, 2001)
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x], atol=1.5e-7)


def test_rows_are_quantised_by_the_definition() -> None:
    x = np.array([[7.0, 7, 7], [127.0, -127, -63.5], [2.0, -1.0, 0]], np.float32)
    q, scale, offset = quantize_rows(x)
    # Halves go to the even integer.
    assert q.tolist() == [[0, 0, 0], [127, -127, -64], [127, -127, -42]]
    assert scale == pytest.approx([0, 1, 1.5 / 127]) and offset.tolist() == [7, 0, 0.5]
    q, scale, offset = quantize_rows(x, 0.01)
    assert q.tolist() == [[127, 127, 127], [127, -127, -127], [127, -100, 0]]
    assert scale == pytest.approx([0.01] * 3) and offset.tolist() == [0] * 3


def test_the_integer_product_is_exact_at_any_width() -> None:
    for width in (1040, 1041, 5000):
        tensors = {
            "a.weight": np.full((1, width), 127, np.int8),
            "a.weight_scale": np.ones(1, np.float32),
            "a.bias": np.zeros(1, np.float32),
        }
        x = np.full((1, width), 127.0, np.float32)
        assert linear(tensors, "a", x)[0, 0] == np.float32(127 * 127 * width)


@needs_native
@pytest.mark.parametrize("scheme", ["int8-dynamic", "bf16"])
def test_the_native_engine_computes_the_same(scheme: str, saved: Any) -> None:
    model = read(saved(scheme=scheme)[1])
    config, arrays = model.facts["encoder"], model.encoder_arrays()
    rng = np.random.default_rng(0)
    lengths = [7, 0, 24, 1]
    tokens = Tokens(
        rng.integers(0, 80, 32),
        np.concatenate([np.arange(n) for n in lengths]),
        rng.integers(0, 2, 32),
        np.array([0, 7, 7, 31, 32], np.int32),
    )
    outputs, hidden = [], []
    for kind in (Engine(config, arrays)._native, ReferenceEngine(config, arrays)):
        out, states = np.empty((32, 48), np.float32), np.empty((3, 32, 48), np.float32)
        kind.run(*tokens[:4], out, states, None, 1)
        outputs.append(out)
        hidden.append(states)
        assert kind.hidden_size == 48 and kind.num_layers == 2
    np.testing.assert_allclose(hidden[0][0], hidden[1][0], atol=1e-5)
    # A value next to the middle of two integers may be rounded either way, one step apart.
    atol = 1e-4 if scheme == "bf16" else 0.05
    np.testing.assert_allclose(outputs[0], outputs[1], atol=atol)
    assert np.abs(outputs[0] - outputs[1]).mean() < atol / 20


def test_it_stands_in_where_nothing_is_built(
    saved: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    _, folder = saved(scheme="bf16")
    expected = Encoder(folder).encode(texts)

    def missing() -> Any:
        raise _native.NativeUnavailable("not built here")

    monkeypatch.setattr(engine._native, "cpu", missing)
    got = Encoder(folder).encode(texts)
    assert "not built here" in caplog.text
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match="input_ids"):
        Encoder(folder).encode([[97]])
