"""Hugging Face models on a quantised encoder: what ``fastbert.quantize`` asks of them and makes."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.hf import inputs
from fastbert.hf.backbone import Encoded, FusedBackbone
from fastbert.hf.dropin import restore
from fastbert.hf.families import FAMILIES, Family, family_of, find, known_class
from fastbert.hf.heads import FusedTask
from fastbert.hf.inputs import Request
from fastbert.hf.parts import embedding_parts, embeddings_obstacle, layer_obstacle, layer_parts
from fastbert.hf.tasks import TASKS, task_of
from fastbert.nn.layer import EmbeddingParts, LayerParts

# Head modules of a family's own -> the Linears that they run, with the activation after each.
_CLASSIFIER = {
    "RobertaClassificationHead": "tanh",
    "XLMRobertaClassificationHead": "tanh",
    "CamembertClassificationHead": "tanh",
    "ElectraClassificationHead": "gelu",
}


class QuantizedBackbone(FusedBackbone):
    """The forward of a bare model whose layers are gone: an encoder stands in for all of them."""

    def __init__(self, module: nn.Module, family: Family, encoder: Any) -> None:
        super().__init__(module, family)
        self.encoder = encoder

    def obstacle(self) -> str | None:
        return None

    def left(self) -> list[str]:
        return []

    def refusal(self, given: dict[str, Any]) -> str | None:
        """Always None: there is no original forward to take. Raises ValueError, with the reason."""
        config: Any = self.module.config
        reason = inputs.refusal(config, given)
        if given.get("output_attentions", getattr(config, "output_attentions", False)):
            reason = "output_attentions: it does not keep its attentions"
        if reason is not None:
            raise ValueError(
                f"a quantised {type(self.module).__name__} cannot serve this: {reason}"
            )
        return None

    def read(self, given: dict[str, Any]) -> Request:
        return inputs.read(self.family, self.module, given)

    def _encode(self, request: Request) -> Encoded:
        x, hidden = self.encoder(request.batch, request.hidden_states)
        return Encoded(x, self._pool(request.batch, x), hidden, None)


class EmbeddingLimits(nn.Module):
    """In place of the embeddings: what reading the arguments of a call asks of them."""

    def __init__(self, padding_idx: int | None, positions: int) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.position_embeddings = SimpleNamespace(weight=torch.empty(positions, 0))


class HuggingFaceSource:
    """A bare or task model of ``transformers`` as ``fastbert.quantize`` reads it, accelerated or
    not. Raises ValueError for a class that is not one of the families' and for layers that are not
    as their class makes them.
    """

    library = "transformers"

    def __init__(self, model: nn.Module) -> None:
        family, task = family_of(model), task_of(model)
        if family is None and task is None:
            raise ValueError(
                f"model: got {type(model).__name__}, expected a model of fastbert's, or a bare or "
                f"task model of transformers of one of the families {', '.join(FAMILIES)} (of a "
                "SentenceTransformer, model[0].auto_model)"
            )
        self.model: Any = model
        self.task = None if task is None else task[1]
        self.family: Family = family if family is not None else task[0]  # type: ignore[index]
        self.prefix = "" if task is None else f"{self.family.prefix}."
        self.backbone: Any = model if task is None else getattr(model, self.family.prefix)
        if getattr(self.backbone.config, "is_decoder", False):
            raise ValueError("model: it is a decoder (config.is_decoder), expected an encoder")

    @property
    def folder(self) -> Path | None:
        """The folder that the model came from."""
        path = Path(str(getattr(self.model.config, "_name_or_path", "") or ""))
        return path if path.name and path.is_dir() else None

    def parts(self) -> tuple[EmbeddingParts, list[LayerParts]]:
        """The modules of the encoder, layers in the order they run."""
        family, backbone = self.family, self.backbone
        layers = family.layers(backbone)
        obstacles = [embeddings_obstacle(family, backbone)]
        obstacles += [layer_obstacle(family, layer) for layer in layers]
        for obstacle in obstacles:
            if obstacle is not None:
                raise ValueError(f"model: {obstacle}, which cannot be quantised")
        return embedding_parts(family, backbone), [layer_parts(family, layer) for layer in layers]

    def twin(self, encoder: Any) -> nn.Module:
        """A copy of the model's heads on ``encoder``, in fp32; its encoder is not copied."""
        names = _encoder_children(self.family, self.backbone)
        # What the memo holds is not copied: the encoder stays behind.
        memo: dict[int, Any] = {id(self.backbone._modules[n]): nn.Identity() for n in names}
        memo[id(self.backbone.embeddings)] = self._limits()
        model = restore(copy.deepcopy(self.model, memo))
        return _install(_without_adapters(model), self.family, names, encoder).float()

    def _limits(self) -> EmbeddingLimits:
        embeddings = self.backbone.embeddings
        positions = embedding_parts(self.family, self.backbone).position.weight.shape[0]
        return EmbeddingLimits(getattr(embeddings, "padding_idx", None), positions)

    def facts(self) -> dict[str, Any]:
        """What a saved model says of the model beside its weights."""
        offset = 0
        if self.family.positions_from_padding:
            offset = self.backbone.embeddings.padding_idx + 1
        head: dict[str, Any] = {
            "task": None,
            "takes": None,
            "steps": None,
            "pooler": self._pooler(),
        }
        if self.task is not None:
            takes = "first" if self.task.takes == "sequence" else self.task.takes
            known = takes != "pooled" or head["pooler"] is not None
            head.update(task=self.task.kind, takes=takes, steps=self._steps() if known else None)
        return {
            "class": str(known_class(self.model)).rpartition(".")[2],
            "family": self.family.name,
            "position_offset": offset,
            "head": head,
        }

    def _pooler(self) -> list[str] | None:
        """The Linear of the model's own pooler, and its activation."""
        pooler = getattr(self.backbone, "pooler", None)
        if pooler is None or self.family.pool is None:
            return None
        if self.family.name == "albert":
            return [f"{self.prefix}pooler", "tanh"]
        return [f"{self.prefix}pooler.dense", "tanh"] if self.family.owns(pooler) else None

    def _steps(self) -> list[list[str]] | None:
        """The Linears of the head with the activation after each; None for any other head."""
        assert self.task is not None
        steps: list[list[str]] = []
        for step in self.task.head:
            if step is F.relu:
                steps[-1][1] = "relu"
                continue
            if not isinstance(step, str):
                return None
            module = find(self.model, tuple(step.split(".")))
            module = getattr(module, "original_module", module)
            kind = type(module).__name__
            if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
                steps.append([step, "none"])
            elif kind in _CLASSIFIER:
                steps += [[f"{step}.dense", _CLASSIFIER[kind]], [f"{step}.out_proj", "none"]]
            elif kind == "BertOnlyNSPHead":
                steps.append([f"{step}.seq_relationship", "none"])
            elif not isinstance(module, nn.Dropout):
                return None
        return steps

    def config_json(self) -> str:
        config = copy.deepcopy(self.model.config)
        config.architectures = [self.facts()["class"]]
        return config.to_json_string(use_diff=False)


def _encoder_children(family: Family, backbone: Any) -> list[str]:
    """The children of a bare model that the encoder stands in for, the embeddings aside."""
    first = {path.partition(".")[0] for path in family.embedding_parts.values()}
    inside = [*family.containers(backbone), *family.layers(backbone)]
    for name, child in backbone.named_children():
        if any(module is child for module in inside):
            first.add(name)
    return sorted(name for name in first - {"embeddings"} if name in backbone._modules)


def _install(model: Any, family: Family, children: list[str], encoder: Any) -> nn.Module:
    """Put a quantised backbone on a model whose embeddings are an EmbeddingLimits already."""
    is_bare = family_of(model) is not None
    backbone = model if is_bare else getattr(model, family.prefix)
    for name in children:
        del backbone._modules[name]
    QuantizedBackbone(backbone, family, encoder).install()
    if not is_bare:
        class_name = known_class(model)
        assert class_name is not None
        FusedTask(model, class_name).install()
    return model


def _without_adapters(model: nn.Module) -> nn.Module:
    """Heads that peft trains or adapts, as plain modules."""
    adapted: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in adapted:
        active = getattr(module, "active_adapters", None)
        plain: Any = None
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            plain = module.modules_to_save[active[0]] if active else module.original_module
        elif hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        if plain is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def rebuild(
    facts: Mapping[str, Any], config_json: str, encoder: Any, has_pooler: bool
) -> nn.Module:
    """A model on ``encoder``, its heads on the meta device, to be filled.

    facts: as HuggingFaceSource.facts() gave them.  Raises ValueError for a class that is none of
    the families'.
    """
    class_name = facts["class"]
    family = FAMILIES.get(facts["family"])
    known = family is not None and (
        f"{family.module}.{class_name}" in TASKS or class_name == family.backbone
    )
    if family is None or not known:
        raise ValueError(
            f"class: got {class_name!r} of {facts['family']!r}, expected one of "
            f"{', '.join(FAMILIES)}"
        )
    cls = getattr(importlib.import_module(family.module), class_name)
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(json.loads(config_json)))
    backbone = model if family_of(model) is not None else getattr(model, family.prefix)
    padding = facts["position_offset"] - 1 if family.positions_from_padding else None
    children = _encoder_children(family, backbone)
    backbone.embeddings = EmbeddingLimits(padding, encoder.max_positions)
    if not has_pooler and getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return _install(model, family, children, encoder)


def load_float(folder: Path) -> nn.Module:
    """The model of a Hugging Face folder, of the class that its config.json names, in fp32.

    Nothing is downloaded.
    """
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or ["AutoModel"]
    cls: Callable[..., Any] | None = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(f"{folder / 'config.json'}: transformers has no class {names[0]}")
    load = cls.from_pretrained  # type: ignore[attr-defined]
    return load(folder, local_files_only=True, dtype=torch.float32).eval()
