"""What a bench case is: our call, the peers' calls, what must be moved and done, and the check."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config

Run = Callable[[], Any]
Tensor = torch.Tensor

# What is timed of a differentiable op: forward, backward alone, both.
HALVES = ("fwd", "bwd", "fwd-bwd")

# Compiled peers may not give their saved tensors away: a backward that is timed runs many times.
torch._functorch.config.donated_buffer = False


@dataclass
class Problem:
    """ours and peers: name -> call. check: largest error of ours against fp64, over torch's own.

    bytes counts each input read once and each output written once, flops the multiplications and
    additions of the mathematics: the floor that a figure is held against, not what a kernel happens
    to do.  others: more calls of ours, ways that are not the default: name -> call.
    """

    ours: Run
    peers: dict[str, Run]
    bytes: int
    flops: int
    check: Callable[[], float] = field(repr=False)
    others: dict[str, Run] = field(default_factory=dict)


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


def ratio(ours: list[Tensor], peer: list[Tensor], exact: list[Tensor]) -> float:
    """Worst err(ours) / (2 err(torch) + tiny) over the tensors; at most 1 passes."""
    floor = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    worst = 0.0
    for o, p, e in zip(ours, peer, exact, strict=True):
        worst = max(worst, error(o, e) / (2 * error(p, e) + floor[o.dtype]))
    return worst


def grads(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def check_against(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> float:
    """``ratio`` of the output and of all gradients, ``plain`` the same in torch."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return ratio(
        grads(ours(*inputs), dy, inputs),
        grads(plain(*inputs), dy, inputs),
        grads(plain(*exact), dy.double(), exact),
    )
