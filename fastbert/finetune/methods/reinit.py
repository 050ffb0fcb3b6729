"""Re-initialisation of the top layers, which have learnt most of what pretraining alone needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.finetune.methods.base import Method, check_number
from fastbert.finetune.methods.structure import encoder_layers


@dataclass
class Reinit(Method):
    """The pooler and the top layers start as before pretraining: weights from a normal of standard
    deviation ``initializer_range`` cut at two of them, biases 0, LayerNorms 1 and 0 (Zhang et al.,
    arXiv 2006.05987, section 5, who re-initialise 1 to 6 of 12 or 24 layers).

    layers: how many.  pooler: whether the pooler too, where there is one.
    seed: of the weights; None draws one from torch's generator.
    """

    name = "reinit"
    paper = "arXiv 2006.05987, section 5"
    summary = "top layers and pooler re-initialised before fine-tuning"

    layers: int = 1
    pooler: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number(self, "layers", 0)
        for option, kind in (("pooler", bool), ("seed", int | None)):
            if not isinstance(getattr(self, option), kind):
                raise ValueError(f"reinit: {option}: got {getattr(self, option)!r}")

    def prepare(self, model: nn.Module) -> None:
        stack = encoder_layers(self, model)
        if self.layers > len(stack):
            raise ValueError(f"reinit: layers: got {self.layers}, the model has {len(stack)}")
        chosen: list[nn.Module] = list(stack[len(stack) - self.layers :])
        if self.pooler:
            chosen += [m for name, m in model.named_modules() if name.split(".")[-1] == "pooler"]
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        config: Any = model.config
        for part in chosen:
            for module in part.modules():
                _initialise(module, config.initializer_range, generator)


@torch.no_grad()
def _initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Drawn on the CPU, so that a seed means the same on every device."""
    if isinstance(module, nn.Linear):
        weight = torch.empty(module.weight.shape)
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        module.weight.copy_(weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
