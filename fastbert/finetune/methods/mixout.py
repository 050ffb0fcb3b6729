"""Mixout: dropout that falls back to the pretrained weights in place of zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods.base import Forward, Inputs, Method, check_number
from fastbert.finetune.methods.parameters import with_parameters
from fastbert.finetune.methods.structure import expect_no_checkpointing, is_head

Tensor = torch.Tensor


@dataclass
class Mixout(Method):
    """Each pass of training computes with

        W' = (M * W + (1 - M) * W_0 - p W_0) / (1 - p)  =  W_0 + M * (W - W_0) / (1 - p)

    in the place of W, with W_0 the weight before training and each element of M 0 with probability
    p and else 1: E[W'] = W, and dL/dW = M * dL/dW' / (1 - p) (Lee et al., arXiv 1909.11299,
    equation 5). In eval mode the model computes with W.

    p: .7 to .9 in the paper. The weights are those of the encoder's Linears, as in its authors'
    code; a head was not pretrained. The model's own dropout, which they turn off, is left as its
    config has it.
    """

    name = "mixout"
    paper = "arXiv 1909.11299"
    summary = "weights that fall back to the pretrained ones at random"
    order = 20

    p: float = 0.7

    def __post_init__(self) -> None:
        check_number(self, "p", 0.0)
        if self.p >= 1.0:
            raise ValueError(f"mixout: p: got {self.p}, expected p < 1")
        self._initial: dict[str, Tensor] | None = None

    def prepare(self, model: nn.Module) -> None:
        expect_no_checkpointing(self, model)
        self._initial = {
            f"{name}.weight": module.weight.detach().clone()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not is_head(model, f"{name}.weight")
        }

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        if not model.training:
            return forward(inputs)
        if self._initial is None:
            raise ValueError("mixout: expected prepare(model) before training")
        mixed = {}
        for name, initial in self._initial.items():
            weight: Any = _tensor(model, name)
            self._initial[name] = initial = initial.to(weight.device, weight.dtype)
            mixed[name] = initial + F.dropout(weight - initial, self.p)
        return with_parameters(model, mixed, forward, inputs)

    def finish(self, model: nn.Module) -> None:
        self._initial = None

    def state(self) -> dict[str, Tensor]:
        return dict(self._initial or {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._initial = {name: x.clone() for name, x in state.items()}


def _tensor(model: nn.Module, name: str) -> Any:
    """What stands under a parameter's name now: not a Parameter inside ``with_parameters``."""
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)
