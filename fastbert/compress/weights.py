"""An encoder's weights: from the modules of any model to the tensors that the engine takes.

int8, per output channel n: ``w_scale[n] = max_k |W[n, k]| / 127`` (1 where the row is 0) and
``q[n, k] = clip(rint(W[n, k] / w_scale[n]), -127, 127)``. bf16 is rounded to nearest even.
Embedding tables are stored in bf16, biases, LayerNorms and scales in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.nn.layer import EmbeddingParts, LayerParts, is_plain_linear

Tensor = torch.Tensor
Arrays = dict[str, np.ndarray]

LINEARS = ("qkv", "attention_output", "up", "down")  # of a layer, in the order they run
PROJECTION = "embeddings.projection"
_NORMS = ("attention_norm", "output_norm")
_TABLES = ("word", "position", "token_type")


@dataclass(frozen=True)
class FloatWeights:
    """An encoder in fp32.

    config: head_dim, layer_norm_eps, activation and layers, as the engine takes them.
    tensors: the engine's names -> fp32 tensors on CPU: tables, norms, weights and biases.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def linears(self) -> list[str]:
        """The names of all Linears, in the order they run."""
        count = 1 + max(self.config["layers"], default=-1)
        names = [f"layers.{i}.{kind}" for i in range(count) for kind in LINEARS]
        return [PROJECTION, *names] if f"{PROJECTION}.weight" in self.tensors else names


def gather(embedding: EmbeddingParts, layers: Sequence[LayerParts]) -> FloatWeights:
    """The fp32 weights of an encoder; a layer that stands in ``layers`` twice is held once.

    Raises ValueError for what the engine does not compute: an activation that is no GELU, ReLU or
    SiLU, a Linear that is wrapped in something that cannot be merged, layers that differ in head
    size or activation, norms that differ in epsilon.
    """
    order: list[int] = []
    distinct: list[LayerParts] = []
    for parts in layers:
        same = [i for i, other in enumerate(distinct) if other.query is parts.query]
        order.append(same[0] if same else len(distinct))
        if not same:
            distinct.append(parts)
    norms = [("embeddings.norm", embedding.norm)]
    tensors: dict[str, Tensor] = {}
    for name in _TABLES:
        table = getattr(embedding, name)
        if table is not None:
            tensors[f"embeddings.{name}"] = _fp32(table.weight)
    if embedding.projection is not None:
        _put_linear(tensors, PROJECTION, [embedding.projection])
    for i, parts in enumerate(distinct):
        groups = ([parts.query, parts.key, parts.value], [parts.attention_output], [parts.up],
                  [parts.down])  # fmt: skip
        for kind, modules in zip(LINEARS, groups, strict=True):
            _put_linear(tensors, f"layers.{i}.{kind}", modules)
        norms += [(f"layers.{i}.{name}", getattr(parts, name)) for name in _NORMS]
    for name, norm in norms:
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise ValueError(f"model: {name} is a {type(norm).__name__}, expected a LayerNorm")
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = _fp32(norm.weight), _fp32(norm.bias)
    config = {
        "head_dim": _one("head size", {parts.head_dim for parts in distinct}, 1),
        "layer_norm_eps": _one("LayerNorm epsilon", {norm.eps for _, norm in norms}, 0.0),
        "activation": _one("activation", {activation_name(p.activation) for p in distinct}, "gelu"),
        "layers": order,
    }
    return FloatWeights(config, tensors)


def _one(what: str, values: set[Any], without_layers: Any) -> Any:
    if len(values) > 1:
        raise ValueError(f"model: got layers of {what} {sorted(values)}, expected one for all")
    return values.pop() if values else without_layers


# What LayerParts calls a fused GELU, and classes of torch and transformers -> the engine's name.
_ACTIVATIONS = {
    "none": "gelu",
    "tanh": "gelu_tanh",
    "relu": "relu",
    "ReLU": "relu",
    "silu": "silu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_name(activation: Any) -> str:
    """ "gelu", "gelu_tanh", "relu" or "silu" for the ``activation`` of LayerParts."""
    given = activation
    if not isinstance(activation, str):
        given = getattr(activation, "__name__", type(activation).__name__)
    if given not in _ACTIVATIONS:
        raise ValueError(f"model: activation {given}, expected one of GELU, ReLU and SiLU")
    return _ACTIVATIONS[given]


def _put_linear(tensors: dict[str, Tensor], name: str, modules: list[Any]) -> None:
    """Weights (out, in) and biases of Linears that share their input, one above the other."""
    pairs = [merged(name, module) for module in modules]
    tensors[f"{name}.weight"] = torch.cat([_fp32(m.weight) for m in pairs])
    tensors[f"{name}.bias"] = torch.cat(
        [torch.zeros(m.out_features) if m.bias is None else _fp32(m.bias) for m in pairs]
    )


def merged(name: str, module: Any) -> nn.Linear:
    """``module`` as one plain Linear; an adapter of peft's (LoRA, DoRA, …) is merged in a copy.

    Raises ValueError for anything that no Linear can stand for.
    """
    if is_plain_linear(module):
        return module
    if hasattr(module, "get_base_layer") and is_plain_linear(module.get_base_layer()):
        if hasattr(module, "merge") and not module.disable_adapters and not module.merged:
            module = copy.deepcopy(module)
            module.merge(safe_merge=True)
        return module.get_base_layer()
    raise ValueError(
        f"model: {name} is a {type(module).__name__} with hooks or wrapped in what cannot be "
        "merged, expected an nn.Linear"
    )


def _fp32(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32).contiguous()


# --- numbers ------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 (out, in) and w_scale fp32 (out) of an fp32 weight."""
    scale = weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale[scale == 0] = 1.0
    q = (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return q.numpy(), scale.numpy()


def to_bf16(x: Tensor) -> np.ndarray:
    """The bits of x in bf16, as numpy uint16."""
    return x.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bf16(x: np.ndarray) -> Tensor:
    """The torch tensor, bf16, that ``to_bf16`` wrote."""
    return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)


def engine_tensors(
    weights: FloatWeights,
    integer: Collection[str],
    input_scales: Mapping[str, float],
    smoothing: Mapping[str, Tensor],
) -> Arrays:
    """All tensors of the engine: Linears named in ``integer`` as int8, the others as bf16.

    input_scales: Linear -> its one activation scale (static); the others quantise each token by its
    own range.  smoothing: Linear -> s (K), by which its weight's columns are multiplied and
    its input divided before either is quantised.
    """
    arrays: Arrays = {}
    linears = set(weights.linears)
    for name, tensor in weights.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in linears and leaf == "weight":
            if owner in integer:
                if owner in smoothing:
                    tensor = tensor * smoothing[owner]
                    arrays[f"{owner}.input_multiplier"] = (1 / smoothing[owner]).numpy()
                arrays[name], arrays[f"{owner}.weight_scale"] = quantize_weight(tensor)
                if owner in input_scales:
                    arrays[f"{owner}.input_scale"] = np.array([input_scales[owner]], np.float32)
            else:
                arrays[name] = to_bf16(tensor)
        elif owner == "embeddings" and leaf in _TABLES:
            arrays[name] = to_bf16(tensor)
        else:
            arrays[name] = tensor.numpy().copy()  # the model may go on training
    return arrays


def chosen(names: Iterable[str | int], linears: Sequence[str]) -> set[str]:
    """The Linears that ``keep_float`` names: 3, "layers.3", "layers.3.down", "down", a projection.

    Raises ValueError for a name that none answers to.
    """
    if isinstance(names, str):
        raise ValueError(f"keep_float: got the text {names!r}, expected a list of names")
    found: set[str] = set()
    for name in names:
        text = f"layers.{name}" if isinstance(name, int) else str(name)
        hits = {
            n for n in linears if n == text or n.startswith(text + ".") or n.endswith("." + text)
        }
        if not hits:
            known = sorted({n.rpartition(".")[0] for n in linears} | set(LINEARS))
            raise ValueError(
                f"keep_float: got {name!r}, expected layers or Linears such as "
                f"{', '.join(known[:6])} or {linears[-1] if linears else PROJECTION}"
            )
        found |= hits
    return found
