"""What a bench case is: our call, the peers' calls, what must be moved and done, and the check."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config

from fastbert import ops

Run = Callable[[], Any]
Tensor = torch.Tensor

# What is timed of a differentiable op: forward, backward alone, both.
HALVES = ("fwd", "bwd", "fwd-bwd")

# Compiled peers may not give their saved tensors away: a backward that is timed runs many times.
torch._functorch.config.donated_buffer = False


@dataclass(frozen=True)
class Parity:
    """How far ours is from fp64, of the output or gradient that is worst.

    over_bound: the error over what is allowed, which is 2 times torch's own; at most 1 passes.
    largest: max |ours - exact|.  relative: ‖ours - exact‖ / ‖exact‖.  torch_largest,
    torch_relative: the same of torch's; None where nothing but the bound was looked at.
    """

    over_bound: float
    largest: float | None = None
    relative: float | None = None
    torch_largest: float | None = None
    torch_relative: float | None = None


@dataclass
class Problem:
    """ours and peers: name -> call. check: ours against fp64 and torch.

    bytes counts each input read once and each output written once, flops the multiplications and
    additions of the mathematics: the floor that a figure is held against, not what a kernel happens
    to do.  others: more calls of ours, ways that are not the default: name -> call.  checks: of
    some of others, by name; one that fails is left out.  half: of HALVES, of those that ``half_of``
    made.  facts: what else a result should say.
    """

    ours: Run
    peers: dict[str, Run]
    bytes: int
    flops: int
    check: Callable[[], Parity] = field(repr=False)
    others: dict[str, Run] = field(default_factory=dict)
    checks: dict[str, Callable[[], Parity]] = field(default_factory=dict, repr=False)
    half: str = "fwd"
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[str, torch.dtype], Problem] = field(repr=False)


def found(name: str) -> Any:
    """The attribute that ``name`` ("package.module:attribute") is; None where it is not to be had:
    not installed, or built for another torch."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None


def half_of(half: str, forward: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> Run:
    """The call to time: ``half`` of HALVES."""
    if half == "fwd":
        return torch.no_grad()(lambda: forward(*inputs))
    if half == "fwd-bwd":
        return lambda: torch.autograd.grad(forward(*inputs), inputs, dy)
    kept: list[Tensor] = []

    def backward() -> Any:
        if not kept:
            kept.append(forward(*inputs))
        return torch.autograd.grad(kept[0], inputs, dy, retain_graph=True)

    return backward


def by_backend(name: str, run: Run) -> Run:
    """``run`` with every op by the backend ``name``."""

    def call() -> Any:
        with ops.use_backend(name):
            return run()

    return call


def leaf(*shape: int, where: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=where)).to(dtype).requires_grad_()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def lengths_of(kind: str, sequences: int, longest: int) -> list[int]:
    """Sequence lengths: "dense" all ``longest``; "ragged" evenly spaced from 8 to ``longest``;
    "wikipedia" as whole paragraphs of an encyclopaedia come, half as long as ``longest`` on
    average, one in five cut off there. The last two in a fixed shuffled order.

    Spaced, not drawn: what padding costs a peer is longest / mean, and the mean of 32 draws may lie
    a sixth off that of the distribution.
    """
    if kind == "dense":
        return [longest] * sequences
    place = (torch.arange(sequences) + 0.5) / sequences
    if kind == "wikipedia":
        # Quantiles of an exponential distribution of mean .62 of the longest, cut off at it.
        spaced = (-0.62 * longest * torch.log1p(-place)).round().long().clamp(8, longest)
    else:
        spaced = torch.linspace(8, longest, sequences).round().long()
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    return spaced[order].tolist()


# --- errors ------------------------------------------------------------------------------------


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def parity(ours: Tensor, exact: Tensor, bound: float, peer: Tensor | None = None) -> Parity:
    """bound: the largest ``error`` that passes."""
    found = [_distance(x, exact) for x in (ours, peer) if x is not None]
    return Parity(error(ours, exact) / bound, *(x for pair in found for x in pair))


def _distance(x: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = x.double() - exact
    norm = exact.norm().clamp_min(1e-30)
    return float(difference.abs().max()), float(difference.norm() / norm)


def worst(found: Iterable[Parity]) -> Parity:
    """Not-a-number is the worst."""
    return max(found, key=lambda one: math.inf if math.isnan(one.over_bound) else one.over_bound)


def compare(ours: list[Tensor], peer: list[Tensor], exact: list[Tensor]) -> Parity:
    """The worst err(ours) / (2 err(torch) + tiny) of the tensors."""
    floor = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    return worst(
        parity(o, e, 2 * error(p, e) + floor[o.dtype], p)
        for o, p, e in zip(ours, peer, exact, strict=True)
    )


def grads(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def check_against(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> Parity:
    """Of the output and of all gradients, ``plain`` the same in torch."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return compare(
        grads(ours(*inputs), dy, inputs),
        grads(plain(*inputs), dy, inputs),
        grads(plain(*exact), dy.double(), exact),
    )


def equality(same: bool) -> Parity:
    """Of what has to have the same bits."""
    return Parity(0.0 if same else math.inf)
