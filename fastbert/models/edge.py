"""The two edges of a model, where padding ends and begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastbert.packed import PackedBatch

Tensor = torch.Tensor


class Edge(NamedTuple):
    """Where padding ends: the packed batch inside, and whether the caller's tensors are padded."""

    batch: PackedBatch
    padded: bool

    @classmethod
    def enter(
        cls,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        batch: PackedBatch | None,
    ) -> Edge:
        """Pack padded tensors, or take the batch that came instead of them."""
        padded = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if batch is None:
            return cls(PackedBatch.from_padded(**padded), True)
        given = [name for name, value in padded.items() if value is not None]
        if given:
            raise ValueError(f"batch: got {', '.join(given)} too, expected one or the other")
        if not isinstance(batch, PackedBatch):
            raise ValueError(f"batch: got {type(batch).__name__}, expected a PackedBatch")
        return cls(batch, False)

    def out(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(T, …) as the caller wants it: as it is, or padded with ``fill``."""
        return self.batch.unpack(x, fill) if self.padded else x

    def states(
        self, hidden: Sequence[Tensor] | None, attentions: Sequence[Tensor] | None
    ) -> dict[str, tuple[Tensor, ...] | None]:
        """The fields of that name in every output, from all layers' (T, H) and probabilities."""
        return {
            "hidden_states": None if hidden is None else tuple(map(self.out, hidden)),
            "attentions": None if attentions is None else tuple(attentions),
        }

    def token_labels(self, labels: Tensor) -> Tensor:
        """Labels of every token, (B, S) or (T,), as (T,).

        Tokens of padding have no prediction here, and so a label there counts for nothing.
        """
        expected = self.batch.padded_shape if self.padded else (self.batch.num_tokens,)
        if tuple(labels.shape) != expected:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {expected}")
        packed = self.batch.pack(labels) if self.padded else labels
        assert packed is not None
        return packed
