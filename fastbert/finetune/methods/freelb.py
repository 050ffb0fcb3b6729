"""FreeLB: adversarial training on word embeddings whose ascent steps all train the model too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.finetune.methods.base import Backward, Forward, Inputs, Method, check_number, loss_of
from fastbert.finetune.methods.inputs import Replay, Words

Tensor = torch.Tensor


@dataclass
class FreeLB(Method):
    """Zhu et al., arXiv 1909.11764, algorithm 1. With X the word embeddings of a sequence of n
    tokens, d their width, and the norm that of all n d elements of a sequence:

        delta_0     ~ U(-1, 1) magnitude / sqrt(n d)
        g_t         = dL(X + delta_t) / d delta
        delta_(t+1) = project(delta_t + step_size g_t / |g_t|)
        project(x)  = x min(1, epsilon / |x|)
        gradient    = 1/K sum_(t < K) dL(X + delta_t) / d theta

    All K passes of an update have the same dropout (section 3.3).

    steps: K.  epsilon: ``inf`` projects nowhere. The defaults are the paper's for RoBERTa on STS-B,
    the middle of its table 7.
    ``gradients`` keeps the graph of one pass at a time; ``loss``, for loops that call backward
    themselves, the graphs of all.
    """

    name = "freelb"
    paper = "arXiv 1909.11764"
    summary = "adversarial embeddings, every ascent step of which trains the model"
    order = 50
    group = "adversarial"

    steps: int = 3
    step_size: float = 0.1
    magnitude: float = 0.16
    epsilon: float = 0.28

    def __post_init__(self) -> None:
        check_number(self, "steps", 1)
        check_number(self, "step_size", 0.0)
        check_number(self, "magnitude", 0.0)
        check_number(self, "epsilon", 0.0, open_at_least=True)

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        losses: list[Tensor] = []

        def gradient(output: Any, delta: Tensor, is_last: bool) -> Tensor | None:
            losses.append(loss_of(self, output))
            if is_last:
                return None
            return torch.autograd.grad(output.loss, delta, retain_graph=True)[0]

        output = self._ascend(forward, inputs, model, gradient)
        output.loss = torch.stack(losses).mean()
        return output

    def gradients(
        self, forward: Forward, inputs: Inputs, backward: Backward, model: nn.Module
    ) -> Any:
        losses: list[Tensor] = []

        def gradient(output: Any, delta: Tensor, is_last: bool) -> Tensor | None:
            losses.append(loss_of(self, output).detach())
            backward(output.loss / self.steps)
            return delta.grad

        output = self._ascend(forward, inputs, model, gradient)
        output.loss = torch.stack(losses).mean()
        return output

    def _ascend(self, forward: Forward, inputs: Inputs, model: nn.Module, gradient: Any) -> Any:
        """The output of the last of K passes. Each is handed to ``gradient``, which returns its
        d delta, not asked for after the last."""
        words = Words.of(inputs, model)
        delta = words.uniform() * self.magnitude / (words.lengths * words.shape[-1]).sqrt()
        replay = Replay(words.device)
        for step in range(self.steps):
            if step:
                replay.rewind()
            delta.requires_grad_()
            output = forward(words.perturbed(delta))
            is_last = step == self.steps - 1
            g = gradient(output, delta, is_last)
            if not is_last:
                delta = self._step(words, delta.detach(), g)
        return output

    def _step(self, words: Words, delta: Tensor, g: Tensor) -> Tensor:
        tiny = torch.finfo(g.dtype).tiny
        delta = delta + self.step_size * g / words.sequence_norm(g).clamp(min=tiny)
        norm = words.sequence_norm(delta).clamp(min=tiny)
        return delta * (self.epsilon / norm).clamp(max=1.0)
