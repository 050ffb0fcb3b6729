"""LoRA, through peft: trained updates of low rank on a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert.finetune.methods import structure
from fastbert.finetune.methods.base import Method, check_number


@dataclass
class LoRA(Method):
    """W x + (alpha / rank) B A x, with A (rank, K) and B (N, rank) trained and W frozen; B starts
    at 0 (Hu et al., arXiv 2106.09685, section 4.1). What stands on the encoder is trained too.
    After training B A is added to W, and the Linears are plain again.

    targets: the names of the Linears. The defaults are the paper's for RoBERTa-base on GLUE.
    dropout: of the x that A sees.
    """

    name = "lora"
    paper = "arXiv 2106.09685"
    summary = "updates of rank 8 on a frozen encoder, added to its weights in the end (needs peft)"
    order = 10
    group = "frozen encoder"
    excludes = ("mixout", "reinit")
    learning_rate = 5e-4

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        check_number(self, "rank", 1)
        check_number(self, "alpha", 0.0, open_at_least=True)
        check_number(self, "dropout", 0.0, 1.0)
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        if not isinstance(targets, Sequence) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"lora: targets: got {targets!r}, expected names of Linears")
        self.targets = tuple(targets)
        self._frozen: list[str] = []

    def prepare(self, model: nn.Module) -> None:
        peft = _peft()
        ends = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
        if unknown := set(self.targets) - ends:
            raise ValueError(
                f"lora: targets: got {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(sorted(ends))}"
            )
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            bias="none",
        )
        peft.inject_adapter_in_model(config, model)
        self._frozen = []
        for name, parameter in model.named_parameters():
            if structure.is_head(model, name) and name in trained:
                parameter.requires_grad_(True)
            elif not parameter.requires_grad and name.replace(".base_layer", "") in trained:
                self._frozen.append(name.replace(".base_layer", ""))

    def finish(self, model: nn.Module) -> None:
        layer_class = _peft().tuners.lora.LoraLayer
        for name, module in list(model.named_modules()):
            if not isinstance(module, layer_class):
                continue
            wrapped: Any = module
            wrapped.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, wrapped.get_base_layer())
        model.__dict__.pop("peft_config", None)
        structure.unfreeze(model, self._frozen)
        self._frozen = []


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"lora: {error.name} is not installed; pip install peft", name=error.name
        ) from error
    return peft
