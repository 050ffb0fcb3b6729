"""The inference engine's equations in fp64, with the error that fp32 may make; random models.

The oracle takes each layer's input as the engine itself gives it (``hidden_states``), so that
layers are judged one by one, and follows two numbers through the equations: a value, and the
variance that the roundings of fp32 give it, taken as independent. The engine must be within SIGMAS
standard deviations. Quantisation is where rounding shows: a value so near to the middle between two
integers that its own SIGMAS reach over it may go either way, and then changes what the next Linear
sees by one whole step, scale * |w|. All others must round as the oracle's. So the deviation of most
rows stays at some 1e-6, and that of a row with such a value grows by what one step does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastbert import _native

UNIT = 2.0**-24  # half a unit in the last place of fp32
SIGMAS = 4.0
WORDS, POSITIONS, TYPES = 50, 300, 3
EPS = 1e-12
RAGGED = (5, 0, 1, 40, 17, 0, 65, 2)

Array = np.ndarray[Any, Any]


# ------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Spec:
    """A random model. A scheme is int8, static, bf16 or float32; `schemes` are exceptions."""

    hidden: int = 64
    head_dim: int = 32
    widths: tuple[tuple[int, int], ...] = ((2, 128), (2, 128))  # heads, intermediate: each set
    layers: tuple[int, ...] = (0, 1)
    activation: str = "gelu"
    scheme: str = "int8"
    schemes: dict[str, str] = field(default_factory=dict)
    embedding: int = 0  # 0: hidden, and no projection
    types: bool = True
    tables: str = "float32"
    smoothed: tuple[str, ...] = ()  # Linears whose input columns have multipliers
    positions: int = POSITIONS


SPECS = {
    "plain": Spec(),
    "head_dim_64": Spec(hidden=96, head_dim=64, widths=((2, 256), (1, 64)), activation="gelu_tanh"),
    "heads_by_thread": Spec(widths=((4, 128), (12, 64))),  # whole column blocks
    "head_dim_80": Spec(hidden=80, head_dim=80, widths=((1, 320), (1, 320)), activation="silu"),
    "uneven": Spec(hidden=72, head_dim=20, widths=((1, 200), (5, 56)), activation="relu"),
    "albert": Spec(embedding=24, widths=((2, 96),), layers=(0, 0, 0), types=False),
    "static": Spec(scheme="static", embedding=40, schemes={"layers.1.up": "int8"}),
    "smoothed": Spec(
        schemes={"layers.1.up": "static"}, smoothed=("layers.0.qkv", "layers.0.up", "layers.1.up")
    ),
    "bf16": Spec(scheme="bf16", tables="uint16"),
    "float32": Spec(scheme="float32", embedding=30, hidden=50, head_dim=25),
    "mixed": Spec(
        schemes={"layers.0.qkv": "bf16", "layers.0.down": "float32", "layers.1.up": "static",
                 "layers.1.attention_output": "bf16"},
        tables="uint16",
    ),
}  # fmt: skip


def to_bf16(x: Array) -> Array:
    """The nearest bf16, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(x: Array) -> Array:
    """bf16 bits or float32 -> float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def make_tensors(spec: Spec, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Array:
        return (random.standard_normal(shape) * scale + mean).astype(np.float32)

    def table(name: str, rows: int) -> None:
        values = normal(rows, embedding)
        tensors[name] = to_bf16(values) if spec.tables == "uint16" else values

    def norm(name: str, size: int) -> None:
        tensors[name + ".weight"] = normal(size, scale=0.2, mean=1.0)
        tensors[name + ".bias"] = normal(size, scale=0.2)

    def linear(name: str, out: int, size: int) -> None:
        scheme = spec.schemes.get(name, spec.scheme)
        weight = normal(out, size, scale=1.5 / math.sqrt(size))
        weight[0] = 0
        if scheme in ("int8", "static"):
            largest = np.abs(weight).max(1)
            scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
            tensors[name + ".weight_scale"] = scale.astype(np.float32)
            weight = np.rint(weight / scale[:, None]).clip(-127, 127).astype(np.int8)
        if scheme == "static":
            tensors[name + ".input_scale"] = np.array([0.013], np.float32)  # some values saturate
        if name in spec.smoothed:
            multiplier = np.exp(random.standard_normal(size)).astype(np.float32)
            tensors[name + ".input_multiplier"] = multiplier
        tensors[name + ".weight"] = to_bf16(weight) if scheme == "bf16" else weight
        tensors[name + ".bias"] = normal(out, scale=0.1)

    embedding = spec.embedding or spec.hidden
    table("embeddings.word", WORDS)
    table("embeddings.position", spec.positions)
    if spec.types:
        table("embeddings.token_type", TYPES)
    norm("embeddings.norm", embedding)
    if spec.embedding:
        linear("embeddings.projection", spec.hidden, embedding)
    for i, (heads, inner) in enumerate(spec.widths):
        linear(f"layers.{i}.qkv", 3 * heads * spec.head_dim, spec.hidden)
        linear(f"layers.{i}.attention_output", spec.hidden, heads * spec.head_dim)
        linear(f"layers.{i}.up", inner, spec.hidden)
        linear(f"layers.{i}.down", spec.hidden, inner)
        norm(f"layers.{i}.attention_norm", spec.hidden)
        norm(f"layers.{i}.output_norm", spec.hidden)
    return tensors


def make_config(spec: Spec) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "layer_norm_eps": EPS,
        "activation": spec.activation,
        "layers": list(spec.layers),
    }


def make_engine(spec: Spec, tensors: dict[str, Array] | None = None) -> Any:
    tensors = make_tensors(spec) if tensors is None else tensors
    return _native.cpu().Engine(make_config(spec), tensors)


class Request(NamedTuple):
    ids: Array
    positions: Array
    types: Array | None
    offsets: Array


def make_request(spec: Spec, lengths: tuple[int, ...], seed: int = 1) -> Request:
    random, tokens = np.random.default_rng(seed), sum(lengths)
    return Request(
        random.integers(0, WORDS, tokens),
        np.concatenate([np.arange(0), *map(np.arange, lengths)]),
        random.integers(0, TYPES, tokens) if spec.types else None,
        np.cumsum([0, *lengths]).astype(np.int32),
    )


def run(engine: Any, request: Request, threads: int = 1, words: Array | None = None) -> Array:
    """The hidden states of all layers; checks that a run without them ends in the same bits."""
    tokens = len(request.positions)
    states = np.full((engine.num_layers + 1, tokens, engine.hidden_size), np.nan, np.float32)
    outs = np.full((2, tokens, engine.hidden_size), np.nan, np.float32)
    ids = request.ids if words is None else None
    rest = request.positions, request.types, request.offsets
    engine.run(ids, *rest, outs[0], states, words, threads)
    engine.run(ids, *rest, outs[1], None, words, threads)
    np.testing.assert_array_equal(states[-1], outs[0], strict=True)
    np.testing.assert_array_equal(outs[0], outs[1], strict=True)
    return states


# ------------------------------------------------------------------------------------------ oracle


class Estimate(NamedTuple):
    """A value in fp64, and the variance of the engine's rounding about it."""

    value: Array
    variance: Array

    def __add__(self, other: Estimate) -> Estimate:
        return rounded(self.value + other.value, self.variance + other.variance)


def exact(x: Array) -> Estimate:
    return Estimate(x.astype(np.float64), np.zeros(x.shape))


def rounded(value: Array, variance: Array, units: float = 1.0) -> Estimate:
    return Estimate(value, variance + (units * UNIT * value) ** 2)


def quantized(x: Estimate, fixed: float | None) -> Estimate:
    """offset + scale * rint((x - offset) / scale), with one step of variance where rint may go
    either way."""
    high, low = x.value.max(-1, keepdims=True), x.value.min(-1, keepdims=True)
    offset = (high + low) / 2 if fixed is None else np.zeros_like(high)
    scale = (high - low) / 254 if fixed is None else np.full_like(high, fixed)
    scale[scale == 0] = 1
    steps = (x.value - offset) / scale
    # Variances of the ends of the range, in steps: half of each goes into the offset, and into the
    # scale. Then the roundings of these two, and of x - offset.
    of_ends = 0.0 if fixed is not None else x.variance.max(-1, keepdims=True) / scale**2 / 2
    of_scale = of_ends / 127**2 + (4 * UNIT) ** 2
    of_offset = of_ends + (2 * UNIT * offset / scale) ** 2
    reach = SIGMAS * np.sqrt(x.variance / scale**2 + steps**2 * of_scale + of_offset)
    undecided = np.abs(steps - np.floor(steps) - 0.5) <= reach
    undecided &= np.abs(steps) < 127.5 + reach
    q = np.rint(steps).clip(-127, 127)
    flips = np.where(undecided, 1 + np.floor(reach), 0)
    return Estimate(offset + q * scale, scale**2 * (flips**2 + q**2 * of_scale + of_offset))


def linear(tensors: dict[str, Array], name: str, x: Estimate, isa: str) -> Estimate:
    weight, bias = tensors[name + ".weight"], tensors[name + ".bias"].astype(np.float64)
    if weight.dtype == np.int8:
        multiplier = tensors.get(name + ".input_multiplier")
        if multiplier is not None:
            x = rounded(x.value * multiplier, x.variance * multiplier.astype(np.float64) ** 2)
        fixed = tensors.get(name + ".input_scale")
        x = quantized(x, None if fixed is None else float(fixed[0]))
        w = weight * tensors[name + ".weight_scale"].astype(np.float64)[:, None]
        variance = x.variance @ (w**2).T
    else:
        w = widened(to_bf16(weight) if weight.dtype == np.float32 else weight).astype(np.float64)
        # A chain of fp32 additions, each of which may round; AMX rounds activations to bf16.
        of_products = weight.shape[1] * UNIT**2 + (2.0**-18 if isa == "amx" else 0.0)
        variance = (x.variance + of_products * x.value**2) @ (w**2).T
    return rounded(x.value @ w.T + bias, variance, 4)


def layer_norm(tensors: dict[str, Array], name: str, z: Estimate) -> Estimate:
    weight, bias = (tensors[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    mean = z.value.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(z.value.var(-1, keepdims=True) + EPS)
    x_hat = (z.value - mean) * rstd
    variance = z.variance + (2 * UNIT * z.value) ** 2
    shared = variance.mean(-1, keepdims=True) / z.value.shape[-1]
    moved = rstd**2 * (variance + (1 + x_hat**2) * shared)
    return rounded(x_hat * weight + bias, weight**2 * (moved + (4 * UNIT * x_hat) ** 2), 2)


def activate(name: str, x: Estimate) -> Estimate:
    u = x.value
    if name == "relu":
        y = np.maximum(u, 0)
    elif name == "silu":
        y = u / (1 + np.exp(-u))
    elif name == "gelu":
        y = 0.5 * u * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
    else:
        y = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return Estimate(y, (1.2**2) * x.variance + (4 * UNIT * u) ** 2)  # no slope is steeper than 1.2


def attention(qkv: Estimate, heads: int, head_dim: int, offsets: Array) -> Estimate:
    value, variance = (part.reshape(-1, 3, heads, head_dim) for part in qkv)
    out = exact(np.zeros_like(value[:, 0]))
    for start, end in pairwise(offsets.tolist()):
        q, k, v = np.moveaxis(value[start:end], 0, 2)  # (N, S, D) each
        var_q, var_k, var_v = np.moveaxis(variance[start:end], 0, 2)
        score = (q @ k.swapaxes(-1, -2)) / math.sqrt(head_dim)
        of_products = head_dim * UNIT**2
        var_score = (
            q**2 @ (var_k + of_products * k**2).swapaxes(-1, -2) + var_q @ (k**2).swapaxes(-1, -2)
        ) / head_dim
        p = np.exp(score - score.max(-1, keepdims=True, initial=-np.inf))
        p /= p.sum(-1, keepdims=True)
        var_p = p**2 * (var_score + (end - start + 16) * UNIT**2)
        context = p @ v
        of_context = var_p @ v**2 + context**2 * var_p.sum(-1, keepdims=True) + p**2 @ var_v
        out.value[start:end] = np.moveaxis(context, 0, 1)
        out.variance[start:end] = np.moveaxis(of_context, 0, 1)
    return rounded(*(part.reshape(len(value), -1) for part in out), 2)


def embed(tensors: dict[str, Array], request: Request, isa: str) -> Estimate:
    x = exact(widened(tensors["embeddings.word"])[request.ids])
    x = x + exact(widened(tensors["embeddings.position"])[request.positions])
    if request.types is not None:
        x = x + exact(widened(tensors["embeddings.token_type"])[request.types])
    x = layer_norm(tensors, "embeddings.norm", x)
    if "embeddings.projection.weight" in tensors:
        x = linear(tensors, "embeddings.projection", x, isa)
    return x


def layer(
    spec: Spec, tensors: dict[str, Array], i: int, state: Array, offsets: Array, isa: str
) -> Estimate:
    name, x = f"layers.{i}.", exact(state)
    qkv = linear(tensors, name + "qkv", x, isa)
    context = attention(qkv, spec.widths[i][0], spec.head_dim, offsets)
    x = layer_norm(
        tensors, name + "attention_norm",
        linear(tensors, name + "attention_output", context, isa) + x,
    )  # fmt: skip
    inner = activate(spec.activation, linear(tensors, name + "up", x, isa))
    return layer_norm(tensors, name + "output_norm", linear(tensors, name + "down", inner, isa) + x)


def check(spec: Spec, tensors: dict[str, Array], request: Request, states: Array, isa: str) -> None:
    stages = [embed(tensors, request, isa)]
    for i, state in zip(spec.layers, states, strict=False):
        stages.append(layer(spec, tensors, i, state, request.offsets, isa))
    deviations = []
    for stage, (expected, have) in enumerate(zip(stages, states, strict=True)):
        deviation = np.sqrt(expected.variance)
        excess = np.abs(have - expected.value) / (SIGMAS * deviation + 1e-30)
        assert np.isfinite(have).all() and (excess <= 1).all(), f"stage {stage}: {excess.max():.3g}"
        deviations.extend(deviation.max(-1))
    if isa != "amx" and deviations:  # the criterion has teeth
        assert np.quantile(deviations, 0.25) < 2e-5
