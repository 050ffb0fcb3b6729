"""R-Drop: two dropouts, one prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert.finetune.methods.base import Forward, Inputs, Method, check_number, loss_of
from fastbert.finetune.methods.predictions import divergence, predictions
from fastbert.finetune.methods.structure import expect_task


@dataclass
class RDrop(Method):
    """Two passes with dropouts of their own give losses L_1, L_2 and predictions P_1, P_2:

        loss = (L_1 + L_2) / 2 + weight (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2

    (Liang et al., arXiv 2106.14448, equation 4, with the mean of both losses in place of their sum,
    as in its authors' code: a learning rate then means what it did). For numbers, the squared
    difference stands for the sum of both KL.

    weight: the paper's alpha, .1 to 1 on GLUE.
    """

    name = "r-drop"
    paper = "arXiv 2106.14448"
    summary = "two passes under different dropout have to agree"
    order = 35

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "weight", 0.0)

    def prepare(self, model: nn.Module) -> None:
        expect_task(self, model)

    def loss(self, forward: Forward, inputs: Inputs, model: nn.Module) -> Any:
        output, second = forward(inputs), forward(inputs)
        apart = divergence(
            predictions(self, output, inputs, model), predictions(self, second, inputs, model)
        )
        mean = (loss_of(self, output) + loss_of(self, second)) / 2.0
        output.loss = mean + self.weight / 2.0 * apart
        return output
