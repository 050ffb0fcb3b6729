"""What methods do to a model's inputs: perturb the word embeddings, and repeat a pass's dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.finetune.methods.base import Inputs
from fastbert.finetune.methods.structure import word_embeddings
from fastbert.packed import PackedBatch

Tensor = torch.Tensor


class Replay:
    """The state of torch's generators, so that further passes draw the same numbers: the same
    dropout, as long as they ask for as many of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        """From here on, draw again what was drawn since this object was made."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@dataclass(frozen=True, eq=False)
class Words:
    """The word embeddings of a model's inputs, alone: positions and segments are added inside it.

    shape: (T, H) with a PackedBatch, else (B, S, H) or (B, choices, S, H).
    real: None with a PackedBatch, else (…, S, 1), 1 at tokens and 0 at padding.
    lengths: tokens of the sequence that each place belongs to, as it broadcasts to ``shape``.
    """

    model: nn.Module
    inputs: Inputs
    table: nn.Embedding
    shape: tuple[int, ...]
    real: Tensor | None
    lengths: Tensor

    @classmethod
    def of(cls, inputs: Inputs, model: nn.Module) -> Words:
        """Raises ValueError for inputs that hold neither a batch nor input_ids."""
        table = word_embeddings(model)
        batch: PackedBatch | None = inputs.get("batch")
        if batch is not None:
            lengths = batch.cu_seqlens.diff().to(table.weight.dtype)
            lengths = _per_token(lengths, batch)[:, None]
            shape = (batch.num_tokens, table.embedding_dim)
            return cls(model, inputs, table, shape, None, lengths)
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("inputs: expected a batch or input_ids, whose embeddings to perturb")
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask != 0
        real = real[..., None].to(table.weight.dtype)
        shape = (*ids.shape, table.embedding_dim)
        return cls(model, inputs, table, shape, real, real.sum(-2, keepdim=True))

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def uniform(self) -> Tensor:
        """Random numbers of ``shape`` in -1 .. 1, 0 at padding."""
        return self._kept(torch.empty(self.shape, **self._kind).uniform_(-1.0, 1.0))

    def normal(self) -> Tensor:
        """Standard normal numbers of ``shape``, 0 at padding."""
        return self._kept(torch.randn(self.shape, **self._kind))

    def sequence_norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of all of a sequence's elements of ``x``, as it broadcasts to it."""
        if self.real is not None:
            return x.square().sum((-2, -1), keepdim=True).sqrt()
        batch: PackedBatch = self.inputs["batch"]
        squares = torch.segment_reduce(x.square().sum(1), "sum", offsets=batch.cu_seqlens)
        return _per_token(squares.sqrt(), batch)[:, None]

    def perturbed(self, delta: Tensor) -> Inputs:
        """The inputs with ``delta`` added to the word embeddings, through which gradients flow to
        both."""
        batch: PackedBatch | None = self.inputs.get("batch")
        if batch is not None:
            embeds = batch.inputs_embeds
            if embeds is None:
                embeds = self._look_up(batch.input_ids)
            batch = batch.replace(input_ids=None, inputs_embeds=embeds + delta)
            return {**self.inputs, "batch": batch}
        ids = self.inputs["input_ids"]
        others = {name: x for name, x in self.inputs.items() if name != "input_ids"}
        padding = self._padding_of_positions()
        if padding is not None and others.get("position_ids") is None:
            real = ids != padding
            others["position_ids"] = real.cumsum(-1) * real + padding
        return {**others, "inputs_embeds": self._look_up(ids) + delta}

    @property
    def _kind(self) -> dict[str, Any]:
        return {"dtype": self.table.weight.dtype, "device": self.device}

    def _kept(self, x: Tensor) -> Tensor:
        return x if self.real is None else x * self.real

    def _look_up(self, ids: Any) -> Tensor:
        return F.embedding(ids, self.table.weight, self.table.padding_idx)

    def _padding_of_positions(self) -> int | None:
        """RoBERTa's positions count the ids that are not this one; without ids they would count
        padding too."""
        for name, module in self.model.named_modules():
            if name.endswith("embeddings") and hasattr(module, "word_embeddings"):
                return getattr(module, "padding_idx", None)
        return None


def _per_token(x: Tensor, batch: PackedBatch) -> Tensor:
    """(B,) -> (T,): for each token what its sequence has."""
    lengths = batch.cu_seqlens.diff()
    return torch.repeat_interleave(x, lengths, output_size=batch.num_tokens)
