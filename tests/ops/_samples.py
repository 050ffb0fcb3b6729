"""One small, ragged call of every op, for tests that ask the same of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastbert import ops

from ._masks import seed_tensor
from ._parity import Function, Inputs
from ._targets import Draw, Target

LENGTHS = (0, 70, 1, 33)
HIDDEN, HEADS, DIM, INNER, CLASSES = 72, 3, 24, 100, 59


@dataclass(frozen=True)
class Sample:
    """``call(**inputs)`` is differentiable in all of ``inputs``; ``grad`` is its first output's.

    name: the public function.  kernels: the op of the table whose kernels it runs, if any.
    pure: whether those kernels are all that it runs; else torch's products come with them.
    """

    name: str
    kernels: str | None
    pure: bool
    call: Function
    inputs: Inputs
    grad: torch.Tensor | None


def samples(target: Target, p: float, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Sample]:
    """By name, every public function of ``fastbert.ops``; ``p`` where it has dropout."""
    return {sample.name: sample for sample in _samples(Draw(target), p, lengths)}


def _samples(draw: Draw, p: float, lengths: tuple[int, ...]) -> Iterator[Sample]:
    tokens, some = sum(lengths), sum(lengths) // 3
    device = draw.target.device
    dropout = {"dropout_p": p, "dropout_seed": seed_tensor(99, device), "dropout_offset": 2}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    x, residual, grad = (draw(tokens, HIDDEN) for _ in range(3))
    vectors = {
        "weight": draw.vector(HIDDEN, scale=0.1, shift=1.0),
        "bias": draw.vector(HIDDEN, scale=0.1),
    }

    yield Sample(
        "attention", "attention", True,
        lambda qkv: ops.attention(qkv, cu_seqlens, max(lengths), **dropout),
        {"qkv": draw(tokens, 3, HEADS, DIM)}, draw(tokens, HEADS, DIM),
    )  # fmt: skip
    yield Sample(
        "bias_gelu", "bias_gelu", True, ops.bias_gelu,
        {"x": x, "bias": vectors["bias"]}, grad,
    )  # fmt: skip
    yield Sample(
        "add_layer_norm", "add_layer_norm", True,
        lambda **tensors: ops.add_layer_norm(**tensors, **dropout),
        {"x": x, "residual": residual, "x_bias": draw.vector(HIDDEN)} | vectors, grad,
    )  # fmt: skip
    ids = draw.ids(31, tokens), draw.ids(40, tokens), draw.ids(2, tokens)
    yield Sample(
        "embed_layer_norm", "embed_layer_norm", True,
        lambda **tensors: ops.embed_layer_norm(*ids, **tensors, padding_idx=0, **dropout),
        {"word": draw(31, HIDDEN), "position": draw(40, HIDDEN), "token_type": draw(2, HIDDEN)}
        | vectors,
        grad,
    )  # fmt: skip
    index = draw.ascending(tokens, some)
    yield Sample(
        "gather_rows", "gather_rows", True,
        lambda x: ops.gather_rows(x, index), {"x": x}, draw(some, HIDDEN),
    )  # fmt: skip
    yield Sample(
        "scatter_rows", "scatter_rows", True,
        lambda x: ops.scatter_rows(x, index, tokens), {"x": draw(some, HIDDEN)}, grad,
    )  # fmt: skip
    labels = draw.ids(CLASSES, tokens)
    labels[::7] = -100
    yield Sample(
        "linear_cross_entropy", "cross_entropy_rows", False,
        lambda hidden, weight, bias: ops.linear_cross_entropy(hidden, weight, bias, labels),
        {"hidden": x, "weight": draw(CLASSES, HIDDEN, scale=0.2), "bias": draw.vector(CLASSES)},
        None,
    )  # fmt: skip
    yield Sample(
        "feed_forward", "bias_gelu", False, ops.feed_forward,
        {"x": x, "w1": draw(INNER, HIDDEN, scale=0.1), "b1": draw.vector(INNER),
         "w2": draw(HIDDEN, INNER, scale=0.1)},
        grad,
    )  # fmt: skip
    yield Sample(
        "qkv_linear", None, False,
        lambda x, q, k, v, q_bias, k_bias, v_bias: ops.qkv_linear(
            x, (q, k, v), (q_bias, k_bias, v_bias)
        ),
        {"x": x}
        | {name: draw(HIDDEN, HIDDEN, scale=0.1) for name in "qkv"}
        | {f"{name}_bias": draw.vector(HIDDEN) for name in "qkv"},
        draw(tokens, 3 * HIDDEN),
    )  # fmt: skip
    yield Sample(
        "linear", None, False, ops.linear,
        {"x": x, "w": draw(INNER, HIDDEN, scale=0.1), "b": draw.vector(INNER)},
        draw(tokens, INNER),
    )  # fmt: skip
