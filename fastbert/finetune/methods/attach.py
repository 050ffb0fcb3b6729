"""Methods in a loop that is not ours: the model's own forward returns their loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastbert.finetune.methods.base import Inputs, Method

Tensor = torch.Tensor


class Attached:
    """Stands in for the forward of one model: in training mode, with gradients on, the method's
    ``loss`` around the forward that was there; else that forward alone."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model = model
        self.method = method
        self._before = model.__dict__.get("forward")
        self._forward = model.forward
        self.__signature__ = inspect.signature(model.forward)  # Trainer keeps columns by it
        model.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.model.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        inputs = {**self.__signature__.bind_partial(*args).arguments, **kwargs}
        return self.method.loss(self._call, inputs, self.model)

    def _call(self, inputs: Inputs) -> Any:
        return self._forward(**inputs)

    def remove(self) -> None:
        """Give the model back the forward that it had."""
        if self.model.__dict__.get("forward") is not self:
            return
        del self.model.__dict__["forward"]
        if self._before is not None:
            self.model.__dict__["forward"] = self._before


def attach(model: nn.Module, method: Method) -> Attached:
    """Make ``model(**inputs)`` return ``method``'s loss while it trains; ``remove()`` undoes it.

    model: native, or of Hugging Face, accelerated or not, given its inputs by name, labels among
        them. ``method.prepare(model)`` comes first; ``after_step`` and ``finish`` are the loop's to
        call. Its ``rates`` reach the loop's optimiser by ``scale_steps``.
    """
    return Attached(model, method)


def scale_steps(
    optimizer: Optimizer, model: nn.Module, rates: dict[str, float]
) -> list[RemovableHandle]:
    """Make each step of ``optimizer`` move the parameters that ``rates`` names by that factor of
    what it would: x <- x_before + rate (x_after - x_before).

    Where a step is proportional to the learning rate, as those of SGD and AdamW are, that is a
    learning rate for each parameter; the optimiser's groups, and what it saves, stay as they are.
    """
    chosen = [(model.get_parameter(name), rate) for name, rate in rates.items()]
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before.extend(p.detach().clone() for p, _rate in chosen)

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for (parameter, rate), x in zip(chosen, before, strict=True):
            parameter.copy_(torch.lerp(x, parameter, rate))
        before.clear()

    return [optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(scale)]
