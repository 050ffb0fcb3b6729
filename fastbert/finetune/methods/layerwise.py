"""Layer-wise learning rates: the lower a layer, the slower it learns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastbert.finetune.methods.base import Method, check_number
from fastbert.train.parameters import param_groups


@dataclass
class LayerwiseLR(Method):
    """rate = lr decay^(L + 2 - depth), depth 0 for the embeddings, l + 1 for layer l of L, L + 1
    for the pooler and L + 2 for the head (Clark et al., arXiv 2003.10555, appendix B, who take .8
    for a base and .9 for a large model).
    """

    name = "layerwise-lr"
    paper = "arXiv 2003.10555, appendix B"
    summary = "a learning rate that decays from the head to the embeddings"

    decay: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "decay", 0.0, 1.0, open_at_least=True)

    def rates(self, model: nn.Module) -> dict[str, float]:
        groups = param_groups(model, 0.0, self.decay)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        named = model.named_parameters()
        return {name: scales[id(p)] for name, p in named if scales.get(id(p), 1.0) != 1.0}
