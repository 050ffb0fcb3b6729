"""What models return: dataclasses under Hugging Face's field names, and tuples and dicts too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


class ModelOutput:
    """Base of the outputs.

    ``out.logits``, ``out["logits"]`` and, counting only the fields that are not None, ``out[0]``,
    ``out[:2]`` and ``loss, logits = out`` all work. (Iteration gives values: a tuple's habit, where
    Hugging Face's class gives keys.)
    """

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None, in order."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return tuple(f.name for f in fields if getattr(self, f.name) is not None)

    def items(self) -> tuple[tuple[str, Any], ...]:
        """(name, value) of each field that is not None, in order."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


# Everywhere below: padded tensors (B, S, …) went in and come out, or packed ones (T, …).
#   hidden_states: the embedding output and that of every layer, L + 1 of (B, S, H) or (T, H).
#   attentions: L probabilities (B, N, S, S), padded in either case; rows of padding are 0.


@dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state: (B, S, H) or (T, H).  pooler_output: (B, H), None without a pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """prediction_logits: (B, S, V) or (T, V).  seq_relationship_logits: (B, 2)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TaskOutput(ModelOutput):
    """logits: masked LM (B, S, V) or (T, V); tokens (B, S, C) or (T, C); sequences (B, C)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """start_logits, end_logits: (B, S), the dtype's lowest number at padding; or (T,)."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
