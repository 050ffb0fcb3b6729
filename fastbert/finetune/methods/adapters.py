"""Adapters: small trained bottlenecks in a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods import structure
from fastbert.finetune.methods.base import Method, check_number

Tensor = torch.Tensor

# The two Linears of a layer whose outputs are about to meet the residual: in BERT and those that
# have its names, and in DistilBERT.
_PLACES = (("attention.output.dense", "output.dense"), ("attention.out_lin", "ffn.lin2"))


class AdaptedLinear(nn.Linear):
    """y = W x + b, then y + up(gelu(down(y))).

    Its weight and bias are those of the Linear that it replaces, under the same names.
    """

    def __init__(self, linear: nn.Linear, size: int, std: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        kind: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(self.out_features, size, **kind)
        self.up = nn.Linear(size, self.out_features, **kind)
        for module in (self.down, self.up):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.up(F.gelu(self.down(y)))


@dataclass
class Adapters(Method):
    """After the attention's output projection and after the FFN, before the residual and LayerNorm:

        h = LN(x + dropout(A(y))),  A(y) = y + W_up gelu(W_down y + b_down) + b_up

    (Houlsby et al., arXiv 1902.00751, section 2.1; they drop out y before A). Weights start from a
    normal of standard deviation ``std`` cut at two of them, so A is nearly the identity. Adapters,
    LayerNorms and what stands on the encoder are trained; all else is frozen. The adapters stay in
    the trained model.

    size: of the bottleneck.
    """

    name = "adapters"
    paper = "arXiv 1902.00751"
    summary = "bottlenecks of 64 trained in a frozen encoder"
    order = 10
    group = "frozen encoder"
    excludes = ("mixout", "reinit")
    structural = True
    learning_rate = 3e-4

    size: int = 64
    std: float = 1e-3

    def __post_init__(self) -> None:
        check_number(self, "size", 1)
        check_number(self, "std", 0.0, open_at_least=True)
        self._frozen: list[str] = []

    def prepare(self, model: nn.Module) -> None:
        layers = structure.encoder_layers(self, model)
        for layer in layers:
            for path in _places(layer):
                parent, _, name = path.rpartition(".")
                adapted = AdaptedLinear(layer.get_submodule(path), self.size, self.std)  # type: ignore[arg-type]
                setattr(layer.get_submodule(parent), name, adapted)
        trained = {name for name, _ in model.named_parameters() if structure.is_head(model, name)}
        for prefix, module in model.named_modules():
            chosen: tuple[str, ...] = ("weight", "bias") if isinstance(module, nn.LayerNorm) else ()
            if isinstance(module, AdaptedLinear):
                chosen = ("down.weight", "down.bias", "up.weight", "up.bias")
            trained.update(f"{prefix}.{name}" for name in chosen)
        self._frozen = structure.train_only(model, trained)
        structure.note(self, model)

    def finish(self, model: nn.Module) -> None:
        structure.unfreeze(model, self._frozen)
        self._frozen = []


def _places(layer: nn.Module) -> tuple[str, str]:
    modules = dict(layer.named_modules())
    for places in _PLACES:
        if all(type(modules.get(path)) is nn.Linear for path in places):
            return places
    expected = " or ".join(" and ".join(places) for places in _PLACES)
    raise ValueError(f"adapters: got a {type(layer).__name__}, expected one with plain {expected}")
