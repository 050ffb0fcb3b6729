"""What the inference engine of fastbert._cpu refuses: each time a ValueError that says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastbert import _native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

WORDS, POSITIONS, TYPES, HIDDEN, INNER = 50, 20, 3, 64, 128
CONFIG = {"head_dim": 32, "layer_norm_eps": 1e-12, "activation": "gelu", "layers": [0, 1]}
NORMS = ("attention_norm", "output_norm")
LINEARS = {
    "qkv": (3 * HIDDEN, HIDDEN),
    "attention_output": (HIDDEN, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


def make_tensors() -> dict[str, Any]:
    tensors: dict[str, Any] = {
        f"embeddings.{name}": np.zeros((rows, HIDDEN), np.float32)
        for name, rows in [("word", WORDS), ("position", POSITIONS), ("token_type", TYPES)]
    }
    layers = ("layers.0.", "layers.1.")
    for name in ("embeddings.norm", *(i + n for i in layers for n in NORMS)):
        tensors |= {f"{name}.{part}": np.ones(HIDDEN, np.float32) for part in ("weight", "bias")}
    for name, shape in ((i + n, shape) for i in layers for n, shape in LINEARS.items()):
        tensors[name + ".weight"] = np.ones(shape, np.int8)
        tensors[name + ".weight_scale"] = np.ones(shape[0], np.float32)
        tensors[name + ".bias"] = np.ones(shape[0], np.float32)
    return tensors


def make_engine(config: dict[str, Any], tensors: dict[str, Any]) -> Any:
    return _native.cpu().Engine(config, tensors)


BAD_TENSORS = {
    "layers.1.up.bias": (None, r"missing, expected float32 of shape \(128,\)"),
    "layers.0.qkv.weight_scale": (None, "missing"),
    "embeddings.norm.bias": (np.zeros(64), "got float64 of shape"),
    "layers.0.qkv.weight": (np.zeros((190, 64), np.int8), r"190 rows, expected a multiple of 3"),
    "layers.0.down.weight": (
        np.zeros((64, 127), np.int8),
        r"got int8 of shape \(64, 127\), expected int8 or uint16 or float32 of shape \(64, 128\)",
    ),
    "layers.0.up.weight": (np.full((128, 64), -128, np.int8), "got -128"),
    "layers.0.up.weight_scale": (np.full(128, np.nan, np.float32), "positive finite scale"),
    "layers.0.up.input_scale": (np.zeros(1, np.float32), "positive finite scale"),
    "layers.2.up.bias": (np.zeros(128, np.float32), "expected no tensor of this name"),
    "embeddings.word": (np.zeros((0, 64), np.float32), r"expected .* \(\*, \*\)"),
    "embeddings.position": (np.zeros((9, 128), np.float32)[:, ::2], "C-contiguous"),
    "layers.0.output_norm.bias": ([1.0], "expected a numpy array"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str) -> None:
    tensor, message = BAD_TENSORS[name]
    tensors = make_tensors()
    if name == "layers.0.qkv.weight":
        for part_name in ("weight_scale", "bias"):
            tensors[f"layers.0.qkv.{part_name}"] = np.ones(190, np.float32)
    tensors[name] = tensor
    if tensor is None:
        del tensors[name]
    with pytest.raises(ValueError, match=f"^{name}.*: .*{message}"):
        make_engine(CONFIG, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"head_dim": "x"}, "head_dim: got 'x'"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: got -1"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected gelu"),
        ({"layers": []}, "layers: got none"),
        ({"layers": [-1]}, "layers: got -1"),
        ({"layers": [0, 2]}, "layers.2.qkv.weight: missing"),
        ({"extra": 1}, "config: got .* only"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(CONFIG | change, make_tensors())
    with pytest.raises(ValueError, match="layers: missing in config"):
        make_engine({"head_dim": 32, "layer_norm_eps": 0.0, "activation": "gelu"}, {})


BAD_ARGUMENTS = {
    "input_ids": (
        (np.full(6, WORDS), r"input_ids\[0\] = 50 is outside \[0, 50\)"),
        (np.full(6, -1), "is outside"),
        (np.zeros(5, np.int64), r"got int64 of shape \(5,\), expected .* \(6,\)"),
        (np.zeros(6, np.int32), "got int32"),
        (None, "input_ids, word_rows: got none"),
    ),
    "position_ids": ((np.full(6, POSITIONS), "is outside"), (None, "got None")),
    "token_type_ids": ((np.full(6, TYPES), "is outside"),),
    "cu_seqlens": (
        (np.array([0, 5], np.int32), r"cu_seqlens\[1\] = 5 must end at the number of tokens, 6"),
        (np.array([1, 6], np.int32), "must be 0"),
        (np.array([0, 7, 6], np.int32), "more than"),
        (np.array([0, 4, 3, 6], np.int32), "descends"),
        (np.array([], np.int32), "got no elements"),
        (np.array([0, 6]), "got int64"),
    ),
    "out": (
        (np.zeros((6, 63), np.float32), r"got float32 of shape \(6, 63\)"),
        (np.zeros((6, 128), np.float32)[:, ::2], "C-contiguous"),
        (None, "got None"),
    ),
    "hidden_states": ((np.zeros((2, 6, 64), np.float32), "hidden_states: got"),),
    "word_rows": ((np.zeros((6, 64), np.float32), "got both"),),
    "num_threads": ((0, "num_threads: got 0"),),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    engine = make_engine(CONFIG, make_tensors())
    good: dict[str, Any] = {
        "input_ids": np.zeros(6, np.int64),
        "position_ids": np.arange(6),
        "token_type_ids": np.zeros(6, np.int64),
        "cu_seqlens": np.array([0, 6], np.int32),
        "out": np.zeros((6, 64), np.float32),
        "hidden_states": None,
        "word_rows": None,
        "num_threads": 1,
    }
    engine.run(**good)
    for value, message in BAD_ARGUMENTS[name]:
        with pytest.raises(ValueError, match=message):
            engine.run(**good | {name: value})
    good["out"].flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        engine.run(**good)
