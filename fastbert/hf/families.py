"""The model families as data: where a Hugging Face model keeps the parts that the encoder needs.

One record a family, from its module names to the fields of ``LayerParts`` and ``EmbeddingParts``
(``parts.py`` reads them). The tasks of each family are in ``tasks.py``. Nothing here imports
``transformers``: classes are recognised by name, and by the forward that they run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

Path = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One family of encoders in ``transformers``.

    name: as in ``config.model_type``.
    module: the module that defines its classes.
    prefix: the attribute of its task models that holds the backbone (``base_model_prefix``).
    backbone, layer: class names of the bare model and of one encoder layer.
    output: class name of what the bare model returns.
    layer_parts: field of ``LayerParts`` -> path inside a layer.
    attention: path inside a layer of the module that knows the head size, and whose training flag
        switches the attention dropout.
    embedding_parts: field of ``EmbeddingParts`` -> path inside the backbone.
    layers: the layers of a backbone in the order of the forward pass.
    containers: modules of a backbone that the packed path goes around, beside the embeddings.
    pool: ``(backbone, (B, H) first tokens) -> (B, H)``, None for a family without a pooler.
    positions_from_padding: RoBERTa's position ids, which count from padding_idx + 1 and skip
        padding.
    """

    name: str
    module: str
    prefix: str
    backbone: str
    layer: str
    output: str
    layer_parts: Mapping[str, str]
    attention: str
    embedding_parts: Mapping[str, str]
    layers: Callable[[Any], list[nn.Module]]
    containers: Callable[[Any], list[nn.Module]]
    pool: Callable[[Any, torch.Tensor], torch.Tensor] | None
    positions_from_padding: bool = False
    paths: Mapping[str, Path] = field(init=False, repr=False)
    inner: tuple[Path, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        paths = {name: tuple(path.split(".")) for name, path in self.layer_parts.items()}
        inner = {path[:n] for path in paths.values() for n in range(1, len(path))}
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "inner", tuple(sorted(inner)))

    def owns(self, module: nn.Module) -> bool:
        """True for a module of a class that the family's own module in ``transformers`` defines."""
        return type(module).__module__ == self.module


def find(module: Any, path: Path) -> Any:
    """``module.a.b.c`` for ("a", "b", "c"), some five times faster than attribute access."""
    for name in path:
        child = module._modules.get(name)
        module = getattr(module, name) if child is None else child
    return module


# --- the table ----------------------------------------------------------------------------------

_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_dropout": "attention.self.dropout",
    "attention_output": "attention.output.dense",
    "attention_output_dropout": "attention.output.dropout",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "activation": "intermediate.intermediate_act_fn",
    "down": "output.dense",
    "output_dropout": "output.dropout",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {  # no dropout after attention
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_dropout": "attention.dropout",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "activation": "ffn.activation",
    "down": "ffn.lin2",
    "output_dropout": "ffn.dropout",
    "output_norm": "output_layer_norm",
}
_ALBERT_LAYER = {  # no dropout after the feed-forward network: AlbertLayer.dropout is never called
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_dropout": "attention.attention_dropout",
    "attention_output": "attention.dense",
    "attention_output_dropout": "attention.output_dropout",
    "attention_norm": "attention.LayerNorm",
    "up": "ffn",
    "activation": "activation",
    "down": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}
_BERT_EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "dropout": "embeddings.dropout",
}
_DISTILBERT_EMBEDDINGS = {k: v for k, v in _BERT_EMBEDDINGS.items() if k != "token_type"}


def _encoder_layers(backbone: Any) -> list[nn.Module]:
    return list(backbone.encoder.layer)


def _pool(backbone: Any, first: torch.Tensor) -> torch.Tensor:
    return backbone.pooler(first[:, None])


def _albert_layers(backbone: Any) -> list[nn.Module]:
    """ALBERT runs a few groups of layers again and again."""
    config, groups = backbone.config, backbone.encoder.albert_layer_groups
    share = config.num_hidden_layers / config.num_hidden_groups
    order = (groups[int(i / share)] for i in range(config.num_hidden_layers))
    return [layer for group in order for layer in group.albert_layers]


_BERT = Family(
    name="bert",
    module="transformers.models.bert.modeling_bert",
    prefix="bert",
    backbone="BertModel",
    layer="BertLayer",
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    layer_parts=_BERT_LAYER,
    attention="attention.self",
    embedding_parts=_BERT_EMBEDDINGS,
    layers=_encoder_layers,
    containers=lambda backbone: [backbone.encoder],
    pool=_pool,
)


def _like_bert(name: str, classes: str, prefix: str, **changes: Any) -> Family:
    """A family with BERT's module names under its own class names."""
    return replace(
        _BERT,
        name=name,
        module=f"transformers.models.{name.replace('-', '_')}.modeling_{name.replace('-', '_')}",
        prefix=prefix,
        backbone=f"{classes}Model",
        layer=f"{classes}Layer",
        **changes,
    )


_ALL = (
    _BERT,
    _like_bert("roberta", "Roberta", "roberta", positions_from_padding=True),
    _like_bert("xlm-roberta", "XLMRoberta", "roberta", positions_from_padding=True),
    _like_bert("camembert", "Camembert", "roberta", positions_from_padding=True),
    _like_bert(
        "electra",
        "Electra",
        "electra",
        output="BaseModelOutputWithPastAndCrossAttentions",
        embedding_parts={**_BERT_EMBEDDINGS, "projection": "embeddings_project"},
        pool=None,
    ),
    Family(
        name="distilbert",
        module="transformers.models.distilbert.modeling_distilbert",
        prefix="distilbert",
        backbone="DistilBertModel",
        layer="TransformerBlock",
        output="BaseModelOutput",
        layer_parts=_DISTILBERT_LAYER,
        attention="attention",
        embedding_parts=_DISTILBERT_EMBEDDINGS,
        layers=lambda backbone: list(backbone.transformer.layer),
        containers=lambda backbone: [backbone.transformer],
        pool=None,
    ),
    Family(
        name="albert",
        module="transformers.models.albert.modeling_albert",
        prefix="albert",
        backbone="AlbertModel",
        layer="AlbertLayer",
        output="BaseModelOutputWithPooling",
        layer_parts=_ALBERT_LAYER,
        attention="attention",
        embedding_parts={**_BERT_EMBEDDINGS, "projection": "encoder.embedding_hidden_mapping_in"},
        layers=_albert_layers,
        containers=lambda backbone: [backbone.encoder, *backbone.encoder.albert_layer_groups],
        pool=lambda backbone, first: backbone.pooler_activation(backbone.pooler(first)),
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
_BACKBONES = {f"{family.module}.{family.backbone}": family for family in _ALL}


def known_class(module: Any) -> str | None:
    """The full name of the ``transformers`` class whose forward ``module`` runs.

    A subclass that writes a forward of its own is not known; one that FSDP or a user derives
    without touching the forward is.
    """
    cls: Any = type(module)
    return _known_class(cls)


@torch.compiler.assume_constant_result
def _known_class(cls: Any) -> str | None:
    return _cached_known_class(cls)


@functools.cache
def _cached_known_class(cls: Any) -> str | None:
    forward = inspect.unwrap(cls.forward)
    known = None
    for base in cls.__mro__:
        if base.__module__.startswith("transformers.models."):
            if inspect.unwrap(base.forward) is not forward:
                break
            known = f"{base.__module__}.{base.__qualname__}"
            if "forward" in base.__dict__:
                break
    return known


def family_of(module: Any) -> Family | None:
    """The family of a bare model (``BertModel``, …), None for anything else."""
    name = known_class(module)
    return None if name is None else _BACKBONES.get(name)
