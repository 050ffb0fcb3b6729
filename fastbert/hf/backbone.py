"""FusedBackbone: what stands in for the forward of a bare model (``BertModel``, …).

Padded tensors are packed where they enter and unpacked where they leave; padding leaves as zeros.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert.hf import inputs
from fastbert.hf.inputs import Request
from fastbert.hf.layer import FusedLayer, ModelPass, checkpoints
from fastbert.hf.parts import (
    embedding_parts,
    embeddings_obstacle,
    is_hooked,
    is_rowwise,
    layer_obstacle,
    must_require_grad,
)
from fastbert.hf.replacement import Replacement, bind
from fastbert.nn.layer import embed, run_layers
from fastbert.packed import PackedBatch

Tensor = torch.Tensor
_ATTENTIONS = "output_attentions: the reference computes the attention"


class Encoded(NamedTuple):
    """What the encoder makes of one Request, packed.

    tokens: (T, H).  pooled: (B, H), None without a pooler.
    hidden: L + 1 of (T, H), and attentions: L of (rows, N, S, S), each None unless asked for.
    """

    tokens: Tensor
    pooled: Tensor | None
    hidden: list[Tensor] | None
    attentions: list[Tensor] | None


class FusedBackbone(Replacement):
    """Same arguments and outputs as the original forward; a Request gives an Encoded instead.

    torch.compile traces it into one graph for all masks, but for the calls of
    ``inputs.graph_obstacle``.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Request):
            return self._encode(args[0])
        if not self.active:
            return self.original(*args, **kwargs)
        given = bind(self.module, args, kwargs)
        if torch.compiler.is_compiling():
            reason = inputs.graph_obstacle(self.family, self.module, given)
            if reason is not None:
                return self.between_graphs(reason, args, kwargs)
        reason = self.refusal(given)
        if reason is not None:
            self.note(reason)
            return self.original(*args, **kwargs)
        request = self.read(given)
        encoded = self._encode(request)
        output = output_class(self.family.module, self.family.output)(
            last_hidden_state=unpacked(self.module, request.batch, encoded.tokens),
            **({} if self.family.pool is None else {"pooler_output": encoded.pooled}),
        )
        for name, value in extra_outputs(self.module, request, encoded).items():
            output[name] = value
        if encoded.hidden is not None:
            output["hidden_states"] = (*output["hidden_states"][:-1], output.last_hidden_state)
        records = getattr(type(self.module), "_can_record_outputs", None) or {}
        if encoded.attentions is not None and "cross_attentions" in records:
            output["cross_attentions"] = ()
        given_dict = kwargs.get("return_dict", getattr(self.module.config, "return_dict", True))
        return output.to_tuple() if given_dict is False else output

    def obstacle(self) -> str | None:
        return self.refusal({})

    def left(self) -> list[str]:
        backbone: Any = self.module
        embeddings = embeddings_obstacle(self.family, backbone)
        left = [] if embeddings is None else [embeddings]
        if getattr(backbone.config, "output_attentions", False):
            left.append(_ATTENTIONS)
        return left

    def refusal(self, given: dict[str, Any]) -> str | None:
        """Why a call with these arguments takes the original forward; None when it is fused."""
        backbone: Any = self.module
        reason = inputs.refusal(backbone.config, given)
        if reason is not None:
            return reason
        for container in self.family.containers(backbone):
            if not self.family.owns(container) or is_hooked(container):
                return f"{type(container).__name__} is hooked or not {self.family.name}'s own"
        layers = self.family.layers(backbone)
        for layer in layers:
            if not isinstance(layer.__dict__.get("forward", self), Replacement):
                return f"the forward of {type(layer).__name__} is replaced by another library"
        wants = given.get("output_attentions", getattr(backbone.config, "output_attentions", False))
        if wants:
            # Layers that are left alone do not hand out their attentions: only hooks see those.
            obstacles = (layer_obstacle(self.family, layer) for layer in layers)
            return next((f"output_attentions, and {o}" for o in obstacles if o), None)
        return None

    def read(self, given: dict[str, Any]) -> Request:
        """The arguments, packed."""
        for layer in self.family.layers(self.module):
            if "forward" not in layer.__dict__:  # it has joined the model since accelerate()
                FusedLayer(layer, self.family, self.strict).install()
        return inputs.read(self.family, self.module, given)

    def _encode(self, request: Request) -> Encoded:
        backbone: Any = self.module
        batch, device = request.batch, request.batch.cu_seqlens.device
        run: Any = ModelPass(backbone.config, device, request.attentions)
        if request.attentions:
            self.note(_ATTENTIONS)
        with _nothing_captured():
            layers = self.family.layers(backbone)
            if torch.compiler.is_compiling() and any(map(checkpoints, layers)):
                run.draw()  # a checkpoint in a graph may change nothing outside of itself
            x = self._embed(request, run)
            x, hidden = run_layers(layers, x, batch, run, request.hidden_states)
        return Encoded(x, self._pool(batch, x), hidden, run.attentions)

    def _embed(self, request: Request, run: Any) -> Tensor:
        backbone: Any = self.module
        obstacle = embeddings_obstacle(self.family, backbone)
        parts = embedding_parts(self.family, backbone)
        if obstacle is None:
            x = embed(parts, request.batch, run, training=True)
            if request.batch.input_ids is not None and must_require_grad(parts.word):
                # Checkpoints in a graph of torch.compile do without.
                eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
                return x.requires_grad_() if eager and x.is_leaf else x
            return x
        self.note(obstacle)
        padded = dict(request.padded)
        if "token_type" not in self.family.embedding_parts:
            del padded["token_type_ids"]
        packed = request.batch.pack(backbone.embeddings(**padded))
        assert packed is not None
        return packed if parts.projection is None else parts.projection(packed)

    def _pool(self, batch: PackedBatch, x: Tensor) -> Tensor | None:
        """The model's own pooler on the first real token of each sequence.

        With padding on the left that is [CLS]; the original reads the padding in column 0.
        """
        backbone: Any = self.module
        pooler = getattr(backbone, "pooler", None)
        if pooler is None or self.family.pool is None:
            return None
        if type(pooler) is nn.Linear or is_rowwise(self.family, pooler):
            return self.family.pool(backbone, batch.first(x))
        return pooler(batch.unpack(x))  # a pooler of the user's own may read every token


@torch.compiler.assume_constant_result
def output_class(module: str, name: str) -> Any:
    """An output class, from the module of a family's models: it imports all that they return."""
    return getattr(importlib.import_module(module), name)


def unpacked(backbone: Any, batch: PackedBatch, x: Tensor) -> Tensor:
    """(T, …) -> (rows, S, …) in the dtype that the original gives.

    Under autocast its last LayerNorm returns fp32 where its parameters are fp32; ours the autocast
    dtype.
    """
    parameter = next(backbone.parameters(), x)
    return batch.unpack(x.to(torch.promote_types(x.dtype, parameter.dtype)))


def extra_outputs(backbone: Any, request: Request, encoded: Encoded) -> dict[str, Any]:
    """hidden_states and attentions, where asked for, as the original returns them."""
    extra: dict[str, Any] = {}
    if encoded.hidden is not None:
        extra["hidden_states"] = tuple(unpacked(backbone, request.batch, h) for h in encoded.hidden)
    if encoded.attentions is not None:
        extra["attentions"] = tuple(encoded.attentions)
    return extra


@contextmanager
def _nothing_captured() -> Iterator[None]:
    """Layers inside are not recorded by an outer transformers model that captures its own."""
    from transformers.utils.output_capturing import _active_collector  # Dynamo knows this import

    token = _active_collector.set({})
    try:
        yield
    finally:
        _active_collector.reset(token)
