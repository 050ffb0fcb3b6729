"""A forward pass with other tensors in the place of some parameters or buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastbert.finetune.methods.base import Forward, Inputs

Tensor = torch.Tensor


class _Pass(nn.Module):
    """``forward``, as a module that has the model as a part."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Inputs) -> Any:
        return self._forward(inputs)


def with_parameters(
    model: nn.Module, tensors: Mapping[str, Tensor], forward: Forward, inputs: Inputs
) -> Any:
    """``forward(inputs)`` while the parameters and buffers of ``model`` of those names are
    ``tensors``.

    Gradients go to ``tensors`` and what they were computed from. Modules stay what they are: a
    plain Linear takes the fused path.
    """
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Pass(model, forward), named, (inputs,))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers by name: a pass that has these leaves the model's as they are."""
    return {name: x.clone() for name, x in model.named_buffers()}
