"""SMART: a smooth model, by an adversary that looks for what changes its predictions most, and
small steps, by staying near the average of the models so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.finetune.methods.base import Forward, Inputs, Method, check_number, loss_of
from fastbert.finetune.methods.inputs import Replay, Words
from fastbert.finetune.methods.parameters import buffers, with_parameters
from fastbert.finetune.methods.predictions import divergence, predictions
from fastbert.finetune.methods.structure import expect_task

Tensor = torch.Tensor

_EARLY = 0.1  # the part of all updates in which the average moves faster (section 4.2)


@dataclass
class SMART(Method):
    """Jiang et al., arXiv 1911.03437, equations 1 to 3. With f the model's prediction, X its word
    embeddings and D the divergence of ``fastbert.finetune.methods.predictions`` (the symmetric KL;
    of numbers, the squared difference):

        loss  = L + weight R + proximal B
        R     = max over |delta|_inf <= epsilon of D(f(X), f(X + delta))
        B     = D(f(X; theta), f(X; average)),  average <- beta average + (1 - beta) theta

    and the maximum is looked for from delta ~ N(0, noise^2) by so many ``steps`` of

        delta <- clip(delta + step_size g / |g|_inf, -epsilon, epsilon),  g = dD / d delta,

    |g|_inf that of each token. beta is .99 in the first tenth of all updates, then .999. All passes
    of an update have the same dropout, so D compares predictions and not dropouts.

    proximal: 0 leaves out B, which costs a pass and a copy of the model.
    step_size is the paper's. Its epsilon = 1e-5 leaves next to nothing of R, which goes with
    epsilon^2, and its authors' code, which scales delta to |delta|_inf = 1, nothing of the text:
    MiniLM-L6 that TREC-6 has trained to a loss of .24 has R = 5e-7 and 4.4 there, and .014 at
    1e-3. R needs fp32: bf16 does not tell predictions apart that are as near as this.
    """

    name = "smart"
    paper = "arXiv 1911.03437"
    summary = "adversarial smoothness of the predictions, and a step near the average model"
    order = 40
    group = "adversarial"

    weight: float = 1.0
    proximal: float = 1.0
    steps: int = 1
    step_size: float = 1e-3
    epsilon: float = 1e-3
    noise: float = 1e-5
    early_beta: float = 0.99
    beta: float = 0.999

    def __post_init__(self) -> None:
        for option in ("weight", "proximal"):
            check_number(self, option, 0.0)
        check_number(self, "steps", 1)
        for option in ("step_size", "epsilon", "noise"):
            check_number(self, option, 0.0, open_at_least=True)
        for option in ("early_beta", "beta"):
            check_number(self, option, 0.0, 1.0)
        self._average: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module) -> None:
        expect_task(self, model)
        self._average = {}

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        words = Words.of(inputs, model)
        delta = words.normal() * self.noise
        replay = Replay(words.device)
        output = forward(inputs)
        clean = predictions(self, output, inputs, model)
        if self.weight:
            target = [prediction.detach() for prediction in clean]
            for _ in range(self.steps):
                delta.requires_grad_()
                replay.rewind()
                noisy = predictions(self, forward(words.perturbed(delta)), inputs, model)
                (g,) = torch.autograd.grad(divergence(target, noisy), delta)
                delta = self._step(delta.detach(), g)
            replay.rewind()
            noisy = predictions(self, forward(words.perturbed(delta)), inputs, model)
            output.loss = loss_of(self, output) + self.weight * divergence(clean, noisy)
        if self.proximal:
            replay.rewind()
            # Running statistics, as cls-norm's, are of the model that is trained, not of this one.
            average = {**self._averages(model), **buffers(model)}
            with torch.no_grad():
                earlier = with_parameters(model, average, forward, inputs)
            earlier = predictions(self, earlier, inputs, model)
            output.loss = loss_of(self, output) + self.proximal * divergence(earlier, clean)
        return output

    def _step(self, delta: Tensor, g: Tensor) -> Tensor:
        largest = g.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        return (delta + self.step_size * g / largest).clamp(-self.epsilon, self.epsilon)

    def _averages(self, model: nn.Module) -> dict[str, Tensor]:
        """Of the trained parameters; they themselves before the first update."""
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if not self._average:
            self._average = {name: p.clone() for name, p in trained.items()}
        for name, p in trained.items():
            self._average[name] = self._average[name].to(p.device, p.dtype)
        return self._average

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        if not self.proximal:
            return
        average = self._averages(model)
        beta = self.early_beta if step <= _EARLY * total else self.beta
        trained = [model.get_parameter(name).detach() for name in average]
        torch._foreach_lerp_(list(average.values()), trained, 1.0 - beta)

    def finish(self, model: nn.Module) -> None:
        self._average = {}

    def state(self) -> dict[str, Tensor]:
        return dict(self._average)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._average = {name: x.clone() for name, x in state.items()}
