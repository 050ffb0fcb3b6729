"""The parts of a Hugging Face layer as they are now, and what keeps one from being fused.

Looked up at every call: a LoRA may have wrapped a Linear, or a user hooked it, since the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastbert.hf.families import Family, find, known_class
from fastbert.nn.layer import EmbeddingParts, LayerParts, is_plain_linear


def layer_parts(family: Family, layer: nn.Module) -> LayerParts:
    """The parts of ``layer`` as they are now."""
    parts = {name: find(layer, path) for name, path in family.paths.items()}
    parts["activation"] = fused_activation(parts["activation"])
    attention = find(layer, tuple(family.attention.split(".")))
    # Hugging Face applies attention dropout when the attention module itself is in training mode.
    dropout = parts["attention_dropout"]
    parts["attention_dropout"] = float(dropout.p) if attention.training else 0.0
    return LayerParts(**parts, head_dim=attention.attention_head_size)


def embedding_parts(family: Family, backbone: nn.Module) -> EmbeddingParts:
    parts: dict[str, Any] = {"token_type": None}
    for name, path in family.embedding_parts.items():
        # ELECTRA has a projection only where the embedding size is not the hidden size.
        optional = name == "projection" and not hasattr(backbone, path.split(".")[0])
        parts[name] = None if optional else find(backbone, tuple(path.split(".")))
    return EmbeddingParts(**parts)


# Classes of transformers.activations that compute one of the two formulas of bias_gelu. FastGELU
# writes sqrt(2 / pi) with ten digits, the others with all.
_GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
}


def fused_activation(activation: Any) -> str | Callable[[torch.Tensor], torch.Tensor]:
    """The name of a GELU that bias_gelu computes ("none" or "tanh"), else the activation itself."""
    if activation is nn.functional.gelu:
        return "none"
    if not isinstance(activation, nn.Module) or is_hooked(activation):
        return activation
    if type(activation) is nn.GELU:
        return activation.approximate
    if type(activation).__module__ == "transformers.activations":
        return _GELUS.get(type(activation).__name__, activation)
    return activation


# Hooks of transformers and peft that the packed path does the work of itself: they record hidden
# states and attentions, or make the output of frozen embeddings require gradients.
_RECORDING = "output_capturing_hook"
_REQUIRING = ("make_inputs_require_grads", "make_inputs_require_grad")
_HOOKS_DONE_HERE = frozenset((_RECORDING, *_REQUIRING))


def is_hooked(module: nn.Module) -> bool:
    """True when calling ``module`` does more than its class's forward and what is done here."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" in module.__dict__:
        return True
    if not module._forward_hooks:
        return False
    return any(_name(hook) not in _HOOKS_DONE_HERE for hook in module._forward_hooks.values())


def must_require_grad(embedding: nn.Module) -> bool:
    """True for a table whose output has to require gradients (``enable_input_require_grads``)."""
    return any(_name(hook) in _REQUIRING for hook in embedding._forward_hooks.values())


def _name(hook: Any) -> str | None:
    """The name of a hook that transformers or peft has set; None for any other."""
    package = str(getattr(hook, "__module__", "")).partition(".")[0]
    return hook.__name__ if package in ("transformers", "peft") else None


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """True for a module of exactly this class that nothing has hooked."""
    return type(module) is kind and not is_hooked(module)


def is_plain_norm(norm: Any) -> bool:
    return is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _is_plain_embedding(table: Any) -> bool:
    if not is_plain(table, nn.Embedding):
        return False
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


_NORMS = ("attention_norm", "output_norm")
_DROPOUTS = ("attention_dropout", "attention_output_dropout", "output_dropout")


def layer_obstacle(family: Family, layer: nn.Module) -> str | None:
    """Why the fused path cannot stand for ``layer`` as a whole; None when it can.

    A wrapped Linear is no obstacle: the fused layer calls it as it is.
    """
    if known_class(layer) != f"{family.module}.{family.layer}":
        return f"{type(layer).__name__} has a forward of its own"
    for path in family.inner:
        inner = find(layer, path)
        if not family.owns(inner):
            return f"{'.'.join(path)} is a {type(inner).__name__}, not {family.name}'s own"
        if is_hooked(inner):
            return f"{'.'.join(path)} has hooks"
    for name in _NORMS:
        if not is_plain_norm(find(layer, family.paths[name])):
            return f"{family.layer_parts[name]} is not a plain LayerNorm"
    for name in _DROPOUTS:
        if name in family.paths and not is_plain(find(layer, family.paths[name]), nn.Dropout):
            return f"{family.layer_parts[name]} is not a plain Dropout"
    return None


def embeddings_obstacle(family: Family, backbone: nn.Module) -> str | None:
    """Why the embeddings run as Hugging Face wrote them; None when they are fused."""
    embeddings: Any = backbone._modules["embeddings"]
    if not family.owns(embeddings):
        return f"embeddings is a {type(embeddings).__name__}, not {family.name}'s own"
    if is_hooked(embeddings):
        return "embeddings has hooks"
    parts = embedding_parts(family, backbone)
    tables = {"word": parts.word, "position": parts.position, "token_type": parts.token_type}
    for name, table in tables.items():
        if name in family.embedding_parts and not _is_plain_embedding(table):
            return f"{family.embedding_parts[name]} is not a plain Embedding"
    if not is_plain_norm(parts.norm):
        return f"{family.embedding_parts['norm']} is not a plain LayerNorm"
    if not is_plain(parts.dropout, nn.Dropout):
        return f"{family.embedding_parts['dropout']} is not a plain Dropout"
    return None


def left_alone(parts: LayerParts) -> list[str]:
    """The parts of a fused layer that run as they are: fields of LayerParts, with what they are."""
    names = ("query", "key", "value", "attention_output", "up", "down")
    modules = {name: getattr(parts, name) for name in names}
    left = [f"{n}: {_describe(m)}" for n, m in modules.items() if not is_plain_linear(m)]
    if not isinstance(parts.activation, str):
        left.append(f"activation: {_describe(parts.activation)}")
    return left


def _describe(module: Any) -> str:
    if not isinstance(module, nn.Module):
        return getattr(module, "__name__", type(module).__name__)
    name = type(module).__name__
    return f"{name} with hooks" if type(module) is nn.Linear and is_hooked(module) else name


def is_rowwise(family: Family, module: Any) -> bool:
    """True for a head that maps each row of its input by itself, so that packed rows will do."""
    original = getattr(module, "original_module", None)  # peft's ModulesToSaveWrapper
    if isinstance(original, nn.Module):
        return is_rowwise(family, original)
    if isinstance(module, nn.Sequential):
        return all(is_rowwise(family, child) for child in module)
    pointwise = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.Identity)
    if isinstance(module, pointwise) or family.owns(module) or hasattr(module, "base_layer"):
        return True  # base_layer: a Linear with one of peft's adapters around it
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
