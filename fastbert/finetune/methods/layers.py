"""More layers than the last: what the head reads is made of the outputs of all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.finetune.methods import structure
from fastbert.finetune.methods.base import Method, check_number
from fastbert.ops import gather_rows
from fastbert.packed import PackedBatch

Tensor = torch.Tensor


class Aggregation(nn.Module):
    """A function of the outputs h_1 … h_L of all layers that takes the place of h_L.

    It sees them by hooks, so that models of any family, packed or padded, stay what they are.

    reads_all_tokens: False for a function of each token by itself. Where the model wants but some
        rows of h_L (``fastbert.nn.layer.Pass``), it is then given those rows of every layer.
    """

    reads_all_tokens: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[Tensor] = []
        self._mask: Tensor | None = None  # (…, S) of padded inputs, None without padding
        self._rows: Tensor | None = None  # those that the model wants, and were not left out

    def install(self, model: nn.Module, layers: nn.ModuleList) -> None:
        model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        for layer in layers[:-1]:
            layer.register_forward_hook(self._see)
        layers[0].register_forward_pre_hook(self._start)
        if self.reads_all_tokens:
            layers[-1].register_forward_pre_hook(self._ask_for_all)
        layers[-1].register_forward_hook(self._replace)

    def _see_inputs(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _start(self, layer: nn.Module, args: Any) -> None:
        self._outputs.clear()

    def _see(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._outputs.append(output)

    def _ask_for_all(self, layer: nn.Module, args: Any) -> Any:
        self._rows = None if _batch(args) is None else getattr(args[2], "rows", None)
        if self._rows is None:
            return None
        return (*args[:2], replace(args[2], rows=None), *args[3:])

    def _replace(self, layer: nn.Module, args: Any, output: Any) -> Tensor:
        outputs, batch = [*self._outputs], _batch(args)
        self._outputs.clear()  # the graph is to hold them, no longer than it lives
        rows = None if batch is None else getattr(args[2], "rows", None)
        if rows is not None:
            outputs = [gather_rows(h, rows) for h in outputs]
        y = self([*outputs, output], batch)
        return y if self._rows is None else gather_rows(y, self._rows)

    def sequence_means(self, values: Tensor, batch: PackedBatch | None) -> Tensor:
        """The mean over the tokens of each sequence, as it broadcasts to ``values``: (T, L) to
        (T, L) with a batch, else (B, S, L) to (B, 1, L)."""
        if batch is None:
            if self._mask is None:
                return values.mean(1, keepdim=True)
            real = (self._mask != 0).flatten(0, -2)[..., None].to(values.dtype)
            return (values * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1.0)
        lengths = batch.cu_seqlens.diff()
        means = torch.segment_reduce(values, "mean", offsets=batch.cu_seqlens)
        return means.repeat_interleave(lengths, 0, output_size=batch.num_tokens)


def _batch(args: Any) -> PackedBatch | None:
    """The batch that a packed layer is called with: ``layer(x, batch, run, index)``."""
    return args[1] if len(args) > 1 and isinstance(args[1], PackedBatch) else None


class Mix(Aggregation):
    """See ScalarMix."""

    def __init__(self, layers: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.zeros(layers))
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = dropout

    def forward(self, outputs: Sequence[Tensor], batch: PackedBatch | None) -> Tensor:
        scalars: Tensor = self.scalars
        if self.training and self.dropout:
            dropped = torch.rand_like(scalars) < self.dropout
            scalars = scalars.masked_fill(dropped & ~dropped.all(), -torch.inf)
        return self.scale * _sum(outputs, scalars.softmax(0).unbind(0))


_BIAS = 0.8  # z is near 0: as in the paper's code, no ReLU starts where it has no gradient


class Excitation(Aggregation):
    """See SqueezeExcitation."""

    reads_all_tokens = True

    def __init__(self, layers: int, hidden: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(layers, max(1, layers // reduction))
        self.excite = nn.Linear(self.squeeze.out_features, layers)
        for module in (self.squeeze, self.excite):
            nn.init.constant_(module.bias, _BIAS)

    def forward(self, outputs: Sequence[Tensor], batch: PackedBatch | None) -> Tensor:
        means = torch.stack([h.mean(-1) for h in outputs], -1)
        z = self.sequence_means(means, batch)
        s = self.excite(self.squeeze(z).relu()).sigmoid()
        return _sum(outputs, (s / s.sum(-1, keepdim=True))[..., None, :].unbind(-1))


class Gate(Aggregation):
    """See GatedLayers."""

    def __init__(self, layers: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.importance = nn.Linear(hidden, 1, bias=False)
        self.gate = nn.Linear(2 * hidden, hidden)
        nn.init.zeros_(self.importance.weight)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, outputs: Sequence[Tensor], batch: PackedBatch | None) -> Tensor:
        weights = torch.cat([self.importance(h) for h in outputs], -1).softmax(-1)
        mixed = _sum(outputs, weights[..., None, :].unbind(-1))
        last = outputs[-1]
        g = self.gate(torch.cat([last, mixed], -1)).sigmoid()
        return g * last + (1.0 - g) * mixed


def _sum(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum_l w_l h_l, without a tensor of all layers."""
    total = weights[0].to(outputs[0].dtype) * outputs[0]
    for w, h in zip(weights[1:], outputs[1:], strict=True):
        total = torch.addcmul(total, w.to(h.dtype), h)
    return total


class _AllLayers(Method, ABC):
    """The base of the three methods: they differ in the module that they add as ``layer_mix``."""

    order = 15
    group = "layer aggregation"
    structural = True
    attribute: ClassVar[str] = "layer_mix"

    @abstractmethod
    def aggregation(self, layers: int, hidden: int) -> Aggregation: ...

    def prepare(self, model: nn.Module) -> None:
        structure.expect_no_checkpointing(self, model)
        if hasattr(model, self.attribute):
            raise ValueError(f"{self.name}: the model has an aggregation of its layers already")
        layers = structure.encoder_layers(self, model)
        config: Any = model.config
        module = self.aggregation(len(layers), config.hidden_size)
        like = next(model.parameters())
        model.add_module(self.attribute, module.to(like.device, like.dtype).train(model.training))
        module.install(model, layers)
        structure.note(self, model)


@dataclass
class ScalarMix(_AllLayers):
    """h = gamma sum_l softmax(s)_l h_l over the L layers, s_l from 0, gamma from 1 (Peters et al.,
    arXiv 1802.05365, equation 1).

    dropout: probability that a pass of training leaves out a layer, s_l = -inf (Kondratyuk and
    Straka, arXiv 1904.02099, section 3.2); all of them at once are kept.
    """

    name = "scalar-mix"
    paper = "arXiv 1802.05365, 1904.02099"
    summary = "the head reads a learnt average of all layers"

    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "dropout", 0.0, 1.0)

    def aggregation(self, layers: int, hidden: int) -> Aggregation:
        return Mix(layers, hidden, self.dropout)


@dataclass
class SqueezeExcitation(_AllLayers):
    """Layers as channels, for each sequence:

        z_l = mean of all elements of h_l,  s = sigmoid(W_2 relu(W_1 z + b_1) + b_2),
        h = sum_l s_l h_l / sum_l s_l

    (Hu et al., arXiv 1709.01507, equations 2 to 4; Su and Cheng, SesameBERT, arXiv 1910.03176, in
    whose code this is one of several ways from the scaled layers to h). LayerNorm centres a token
    before it scales and shifts it, so z tells texts apart but faintly.

    reduction: W_1 is (L / reduction, L); 3 in their code.
    """

    name = "squeeze-excitation"
    paper = "arXiv 1910.03176"
    summary = "the head reads all layers, weighted anew for each text"

    reduction: int = 3

    def __post_init__(self) -> None:
        check_number(self, "reduction", 1)

    def aggregation(self, layers: int, hidden: int) -> Aggregation:
        return Excitation(layers, hidden, self.reduction)


@dataclass
class GatedLayers(_AllLayers):
    """For each token, with a = sum_l softmax_l(v . h_l) h_l:

        g = sigmoid(W [h_L; a] + b),  h = g * h_L + (1 - g) * a

    after HIRE (Yang and Zhao, arXiv 1911.01940), which also fuses the last layer with what it finds
    important in all of them; there a bi-GRU over the tokens of each layer tells how important it
    is, here v alone. v starts from 0.

    bias: what b starts from; at 2, g is .88, and h near the h_L that the head knows.
    """

    name = "gated-layers"
    paper = "arXiv 1911.01940"
    summary = "a gate between the last layer and an attention over all of them"

    bias: float = 2.0

    def __post_init__(self) -> None:
        check_number(self, "bias", -math.inf)

    def aggregation(self, layers: int, hidden: int) -> Aggregation:
        return Gate(layers, hidden, self.bias)
