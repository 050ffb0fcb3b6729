"""[CLS] normalisation: features of the classifier centred and scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods import structure
from fastbert.finetune.methods.base import Method, check_number

Tensor = torch.Tensor
_EPS = 1e-5
_ATTRIBUTE = "cls_norm"


class FeatureNorm(nn.Module):
    """BatchNorm without parameters; a batch of one row is normalised by the running statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        training = self.training and len(x) > 1
        return F.batch_norm(
            x, self.running_mean, self.running_var, None, None, training, self.momentum, _EPS
        )

    def hook(self, dropout: nn.Module, args: tuple[Tensor]) -> Tensor:
        return self(args[0])


@dataclass
class ClsNorm(Method):
    """The features x (B, H) of [CLS] that the classifier reads become, before its dropout,

        x' = (x - mean) / sqrt(var + 1e-5)

    each feature by its mean and variance over the batch in training, and by their running averages
    in eval mode. Pretrained [CLS] features have means far from 0 and concentrate on few dimensions,
    which makes gradients large (Zhou et al., arXiv 1911.03918, since withdrawn by its authors; of
    their normalisations this is the one by statistics of the data). After training it is merged
    into the classifier: W' = W / sqrt(var + 1e-5), b' = b - W' mean.

    momentum: running <- (1 - momentum) running + momentum batch.
    """

    name = "cls-norm"
    paper = "arXiv 1911.03918"
    summary = "features of [CLS] normalised before the classifier"
    order = 16

    momentum: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "momentum", 0.0, 1.0, open_at_least=True)

    def prepare(self, model: nn.Module) -> None:
        structure.expect_task(self, model, ("SequenceClassification", "MultipleChoice"))
        classifier: Any = getattr(model, "classifier", None)
        dropout: Any = getattr(model, "dropout", None)
        if not isinstance(classifier, nn.Linear) or not isinstance(dropout, nn.Dropout):
            raise ValueError(
                f"cls-norm: got a {type(model).__name__}, expected one whose classifier is a "
                "Linear behind a dropout"
            )
        norm = FeatureNorm(classifier.in_features, self.momentum)
        weight = classifier.weight
        model.add_module(_ATTRIBUTE, norm.to(weight.device, weight.dtype).train(model.training))
        self._handle = dropout.register_forward_pre_hook(norm.hook)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        classifier: Any = model.get_submodule("classifier")
        norm: Any = model.get_submodule(_ATTRIBUTE)
        classifier.weight.div_((norm.running_var + _EPS).sqrt())
        classifier.bias.sub_(classifier.weight @ norm.running_mean)
        self._handle.remove()
        delattr(model, _ATTRIBUTE)
