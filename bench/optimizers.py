"""One step of an optimiser over BERT-base's parameters, beside its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import work
from problem import Parity, error, parity

from fastbert.train import AdamW, Lamb

Run = Callable[[], Any]
Tensor = torch.Tensor

LR, EPS, DECAY = 1e-4, 1e-6, 0.01


def base_shapes() -> list[tuple[int, ...]]:
    """Of the 110 M parameters of BertForPreTraining, base."""
    hidden, up = 768, 3072
    layer = [*[(hidden, hidden), (hidden,)] * 4, (up, hidden), (up,), (hidden, up)]
    layer += [(hidden,)] * 5
    embeddings = [(30522, hidden), (512, hidden), (2, hidden), (hidden,), (hidden,)]
    heads = [*[(hidden, hidden), (hidden,)] * 2, (hidden,), (hidden,), (30522,), (2, hidden), (2,)]
    return [*embeddings, *layer * 12, *heads]


def _first_step(p: Tensor, g: Tensor, lamb: bool) -> Tensor:
    """The parameter after the first step from zero state, in the dtype of its arguments."""
    u = g / (g.square().sqrt() + EPS) + DECAY * p  # the corrections undo 1 - beta
    return p - LR * (p.norm() / u.norm() if lamb else 1.0) * u


def optimizer_step(
    kind: str, where: str, dtype: torch.dtype
) -> tuple[Run, dict[str, Run], int, int, Callable[[], Parity]]:
    """What a Problem is made of: our call, the peers' calls, bytes, flops, the check.

    kind: "adamw", "adamw-clip" (gradients clipped to norm 1, the step included) or "lamb".
    dtype: of parameters and gradients; 16-bit ones have an fp32 master here, and moments in 16 bits
    at torch, which moves half as much for less.
    """
    ours_of, lamb = (Lamb if kind == "lamb" else AdamW), kind == "lamb"
    clip = 1.0 if kind == "adamw-clip" else None
    shapes = base_shapes()
    grads = [(1e-3 * torch.randn(s, device=where)).to(dtype) for s in shapes]

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter((0.02 * torch.randn(s, device=where)).to(dtype)) for s in shapes]
        for p, g in zip(made, grads, strict=True):
            p.grad = g
        return made

    def peer(make: Callable[[Any], Any]) -> Run:
        params = parameters()
        optimizer = make(params)

        def step() -> None:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()

        return step

    def fused(params: Any) -> torch.optim.Optimizer:
        # A step that a graph can hold, which costs this one nothing.
        return torch.optim.AdamW(params, LR, fused=True, capturable=where == "cuda")

    peers = {}
    if lamb:
        # No LAMB in torch: its AdamW moves less, and is the floor.
        peers["torch AdamW fused"] = peer(fused)
    else:
        peers["torch fused"] = peer(fused)
        peers["torch foreach"] = peer(lambda p: torch.optim.AdamW(p, LR, foreach=True))
    try:
        apex = importlib.import_module("apex.optimizers")
        apex_of = apex.FusedLAMB if lamb else apex.FusedAdam
        peers["apex"] = peer(lambda p: apex_of(p, LR, eps=EPS, weight_decay=DECAY))
    except (ImportError, RuntimeError):  # not installed, or without its extensions
        pass

    ours = ours_of(parameters(), LR, eps=EPS, weight_decay=DECAY, max_grad_norm=clip)

    def check() -> Parity:
        torch.manual_seed(0)
        p, g = (torch.randn(768, 768, device=where).to(dtype) for _ in range(2))
        mine = torch.nn.Parameter(p.clone())
        mine.grad = g.clone()
        ours_of([mine], LR, eps=EPS, weight_decay=DECAY).step()
        exact = _first_step(p.double(), g.double(), lamb)
        torchs = _first_step(p, g, lamb)
        bound = 2 * error(torchs, exact) + 1e-6 / float(exact.abs().max())
        return parity(mine.detach(), exact, bound, torchs)

    elements = sum(g.numel() for g in grads)
    return ours.step, peers, work.optimizer(elements, dtype.itemsize, lamb).bytes, 0, check
