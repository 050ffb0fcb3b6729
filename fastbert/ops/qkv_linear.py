"""qkv_linear: three Linears that write one packed (T, 3H)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import wants_grad
from fastbert.ops._matmul import add_mm_, autocast_to, few_rows, mm, mm_t, widens
from fastbert.ops.linear import traced_linear


def qkv_linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    *,
    joined: bool | None = None,
) -> torch.Tensor:
    """[x w_0^T + b_0 | x w_1^T + b_1 | …], columns side by side.

    x: (T, H).  weights: each (K, H).  biases: each (K,) or None.  Returns (T, len(weights) * K);
    under autocast in the autocast dtype.  Raises ValueError for bad shapes, dtypes or devices.
    Checkpoints hold query, key and value apart.
    joined: whether the weights are copied side by side for one product, two in backward, or each
        has its own, three and six: these write into the columns of one output and sum dx in place.
        None joins them on a GPU. There the copy of BERT-base's is 7 MB of traffic, 2 us. Apart, dx
        is rounded and read back twice, and the product of a weight's gradient has 36 tiles of
        128 x 128 for 132 multiprocessors, joined 108; and where a batch is small, launches count.
        On a CPU each product fills all cores, and the copy would be for nothing.
    """
    _check.activation("x", x, ("T", "H"))
    joined = x.is_cuda if joined is None else joined
    x, *cast = autocast_to(x, *weights)
    weights = tuple(cast)
    if len(biases) != len(weights):
        raise ValueError(f"biases: got {len(biases)}, expected {len(weights)}, one a weight")
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        _check.like(f"weights[{i}]", w, x, (weights[0].shape[0], x.shape[1]))
        _check.vector(f"biases[{i}]", b, x, w.shape[0])
    biases = tuple(b if b is None or b.dtype == x.dtype else b.to(x.dtype) for b in biases)
    if torch.compiler.is_compiling():
        if joined:
            return traced_linear(x, torch.cat(weights), _joined_bias(biases, weights))
        parts = [traced_linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return torch.cat(parts, 1)
    if torch.is_grad_enabled() and wants_grad(x, *weights, *biases):
        return _QkvLinear.apply(x, joined, len(weights), *weights, *biases)
    return _forward(x, weights, biases, joined)


def _joined_bias(
    biases: tuple[torch.Tensor | None, ...], weights: tuple[torch.Tensor, ...]
) -> torch.Tensor | None:
    if all(b is None for b in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for b, w in pairs])


def _forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    joined: bool,
) -> torch.Tensor:
    if joined:
        return F.linear(x, torch.cat(weights), _joined_bias(biases, weights))
    width = weights[0].shape[0]
    out = x.new_empty(x.shape[0], len(weights) * width)
    columns = [out[:, i * width : (i + 1) * width] for i in range(len(weights))]
    # On CPU, BLAS is handed a bias as a copy of it in every row, which the product then reads back;
    # one pass over the output in the end is 7% faster for 1024 tokens of BERT-base in fp32. In 16
    # bits that pass would round a second time.
    wide_on_cpu = x.device.type == "cpu" and x.dtype.itemsize > 2
    if wide_on_cpu or few_rows(x, weights[0]) or widens(x, min(*x.shape, width)):
        for part, w in zip(columns, weights, strict=True):
            mm_t(x, w, out=part)
        given = [b for b in biases if b is not None]
        if len(given) == len(biases):
            return out.add_(torch.cat(given))
        for part, b in zip(columns, biases, strict=True):
            if b is not None:
                part.add_(b)
        return out
    for part, w, b in zip(columns, weights, biases, strict=True):
        if b is None:
            mm(x, w.t(), out=part)
        else:
            torch.addmm(b, x, w.t(), out=part)
    return out


class _QkvLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, joined: bool, count: int, *parameters: Any
    ) -> torch.Tensor:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.joined = joined
        return _forward(x, weights, biases, joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        count, width = len(weights), weights[0].shape[0]
        want_x, _, _, *wants = ctx.needs_input_grad
        want_weights, want_biases = wants[:count], wants[count:]
        dx = None
        if ctx.joined:
            if want_x:
                dx = mm(dy, torch.cat(weights))
            dweight = mm(dy.t(), x) if any(want_weights) else None
            dweights = _wanted_rows(dweight, width, want_weights)
        else:
            parts = [dy[:, i * width : (i + 1) * width] for i in range(count)]
            if want_x:
                dx = mm(parts[0], weights[0])
                for part, w in zip(parts[1:], weights[1:], strict=True):
                    add_mm_(dx, part, w)
            pairs = zip(parts, want_weights, strict=True)
            dweights = [mm(part.t(), x) if want else None for part, want in pairs]
        dbias = dy.sum(0) if any(want_biases) else None
        return dx, None, None, *dweights, *_wanted_rows(dbias, width, want_biases)


def _wanted_rows(
    joined: torch.Tensor | None, height: int, wants: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Each weight's or bias's ``height`` rows of the gradient of all; None where not wanted."""
    if joined is None:
        return [None] * len(wants)
    return [part if want else None for part, want in zip(joined.split(height), wants, strict=True)]
