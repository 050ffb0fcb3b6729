"""Which parameters decay and how fast each learns; the norm of their gradients; their shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastbert.ops.optimizer import total_norm

Tensor = torch.Tensor

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` as an optimiser of this package takes them.

    weight_decay: of matrices; LayerNorms and biases, all vectors and scalars that is, have none
        (Devlin et al., arXiv 1810.04805, in Google's code).
    layer_decay: None, or what the learning rate is multiplied by from each depth to the one below:
        lr_scale = layer_decay^(L + 2 - depth), depth 0 for the embeddings, l + 1 for layer l of L,
        L + 1 for a pooler and L + 2 for heads (Clark et al., arXiv 2003.10555, appendix B, with the
        exponents of its authors' code).
    Returns groups with "params", "weight_decay" and "lr_scale", a factor of the optimiser's lr.
    Raises ValueError for a model without numbered layers when there is a ``layer_decay``.
    """
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay: got {layer_decay}, expected 0 < layer_decay <= 1 or None")
    named = list(model.named_parameters())
    numbers = [int(found[1]) for name, _ in named if (found := _LAYER.search(name))]
    if layer_decay is not None and not numbers:
        raise ValueError(
            f"layer_decay: got {layer_decay}, but {type(model).__name__} has no numbered layers; "
            "expected None"
        )
    top = max(numbers, default=0) + 3  # L + 2
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale = 1.0 if layer_decay is None else layer_decay ** (top - _depth(name, top))
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def _depth(name: str, top: int) -> int:
    """0 at the embeddings, ``top`` at the heads."""
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) + 1
    if "embeddings" in name:
        return 0
    return top - 1 if "pooler" in name else top


def clip_grad_norm_(params: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Multiply all gradients by min(1, max_norm / (norm + 1e-6)), norm that of all of them as one
    vector (Pascanu et al., arXiv 1211.5063, algorithm 1), and return norm, 0-d.

    As ``torch.nn.utils.clip_grad_norm_``, in one dtype for gradients of any, and never waiting for
    the device. ``AdamW(..., max_grad_norm=...)`` does the same without a pass of its own.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    params = [p for p in params if p.grad is not None]
    if not params:
        return torch.zeros(())
    grads = [local(p.grad) for p in params if p.grad is not None]
    norm = grad_norm(grads, all_reduce_of(params))
    torch._foreach_mul_(grads, 1.0 / grad_scale(norm, max_norm))
    return norm


def grad_norm(grads: list[Tensor], all_reduce: Callable[[Tensor], None] | None) -> Tensor:
    """The norm of ``grads`` as one vector, 0-d, fp32 (fp64 where one of them is).

    all_reduce: adds up over the ranks that hold other shards; None where gradients are whole.
    """
    norm = total_norm(grads)
    if all_reduce is None:
        return norm
    square = norm.square()
    all_reduce(square)
    return square.sqrt()


def grad_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of that norm are divided by to be clipped, fp32:
    max(1, (norm + 1e-6) / max_norm).

    A norm that is nan or infinite stays so, and the gradients become 0 or nan, as torch's do.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1.0).float()


def local(x: Any) -> Tensor:
    """The shard of ``x`` that this rank holds; ``x`` itself where it is whole."""
    return x.to_local() if is_sharded(x) else x


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor, as FSDP2's parameters are.

    Asked so, because importing the class takes half a second, which only those who shard spend.
    """
    return hasattr(x, "device_mesh")


def all_reduce_of(params: Iterable[Any]) -> Callable[[Tensor], None] | None:
    """A function that adds a tensor up, in place, over the ranks that hold the other shards of
    ``params``; None where each rank holds them whole.

    Raises ValueError unless all are sharded alike (as FSDP2's ``fully_shard`` of a whole model
    leaves them).
    """
    layouts = {
        (p.device_mesh, tuple(place.is_shard() for place in p.placements))
        if is_sharded(p)
        else None
        for p in params
    }
    if len(layouts) > 1:
        raise ValueError("params: got some sharded in one way and some in another, expected one")
    (layout,) = layouts or {None}
    if layout is None:
        return None
    mesh, shards = layout
    groups = [mesh.get_group(axis) for axis, is_shard in enumerate(shards) if is_shard]

    def all_reduce(x: Tensor) -> None:
        for group in groups:
            dist.all_reduce(x, group=group)

    return all_reduce
