"""PackedBatch: the tokens of a batch end to end, without padding, and the way back.

Padding exists at the two edges of a model only. ``from_padded``, ``from_sequences`` and
``from_flat`` make a PackedBatch, every layer works on ``(T, …)`` tensors, and ``unpack`` restores
``(B, S, …)`` for a caller who asked for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fastbert.ops import gather_rows, packed_layout, scatter_rows

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of T tokens in total.

    input_ids: (T,) int64, or None with inputs_embeds.
    token_type_ids, position_ids: (T,) int64 or None (the model's default).
    inputs_embeds: (T, H) in place of input_ids.
    cu_seqlens: (B + 1,) int32: sequence b holds tokens cu_seqlens[b] .. cu_seqlens[b + 1].
    lengths: the B lengths, on the host: nothing in a forward pass waits for the device to learn
    them.
    padded_shape: (rows, S) of the padded tensors that ``pack`` takes and ``unpack`` makes.
    indices: (T,) int64, ascending: place of each token among the rows * S padded ones; None when
        nothing was padded, and packing is a view.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    padded_shape: tuple[int, int]
    indices: Tensor | None

    @property
    def max_seqlen(self) -> int:
        # Not max(…, default=0), which Dynamo refuses once it has made the lengths symbols.
        return max((0, *self.lengths))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> PackedBatch:
        """From (B, S) tensors as a Hugging Face model takes them.

        attention_mask: (B, S), nonzero for real tokens, anywhere in a row; None when all are real.
        position_ids: (B, S) or (1, S); None leaves each token its column in the padded row.
        inputs_embeds: (B, S, H) in place of input_ids.
        On a GPU a mask costs one wait for the device, to learn the lengths.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        expected_dims = 2 if input_ids is not None else 3
        if given.dim() != expected_dims:
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            shape = "(B, S)" if input_ids is not None else "(B, S, H)"
            raise ValueError(f"{name}: got shape {tuple(given.shape)}, expected {shape}")
        rows, columns = given.shape[:2]
        for name, x in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if x is not None and tuple(x.shape) != (rows, columns):
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {(rows, columns)}")
        if position_ids is None:
            position_ids = torch.arange(columns, device=given.device)[None]
        if position_ids.dim() == 1:
            position_ids = position_ids[None]
        if position_ids.shape[1] != columns or position_ids.shape[0] not in (1, rows):
            raise ValueError(
                f"position_ids: got shape {tuple(position_ids.shape)}, expected {(rows, columns)}"
            )
        position_ids = position_ids.expand(rows, columns)

        batch = cls._layout(attention_mask, rows, columns, given.device)
        return batch.replace(
            input_ids=batch.pack(input_ids),
            token_type_ids=batch.pack(token_type_ids),
            position_ids=batch.pack(position_ids),
            inputs_embeds=batch.pack(inputs_embeds),
        )

    @classmethod
    def _layout(
        cls, mask: Tensor | None, rows: int, columns: int, device: torch.device
    ) -> PackedBatch:
        """The batch of a mask, without its tokens."""
        lengths, indices = _lengths_and_indices(mask, rows, columns)
        offsets = _offsets(lengths, device)
        return cls(None, None, None, None, offsets, lengths, (rows, columns), indices)

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        token_type_ids: Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """From B lists of token ids; no padded tensor is ever made. Empty lists are legal."""
        lengths = tuple(len(s) for s in sequences)
        if token_type_ids is not None and tuple(len(s) for s in token_type_ids) != lengths:
            raise ValueError("token_type_ids: expected one list of the same length a sequence")
        flat = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
        types = None
        if token_type_ids is not None:
            types = torch.tensor([i for s in token_type_ids for i in s], dtype=torch.int64)
            types = types.to(device)
        return cls.from_flat(flat.to(device), lengths, token_type_ids=types)

    @classmethod
    def from_flat(
        cls,
        input_ids: Tensor | None,
        lengths: Sequence[int],
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> PackedBatch:
        """From tokens that already stand end to end, (T,) or (T, H), and the B lengths (host ints).

        position_ids: (T,); None counts from 0 in each sequence. ``unpack`` pads to the longest.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        lengths = tuple(int(n) for n in lengths)
        if any(n < 0 for n in lengths) or sum(lengths) != given.shape[0]:
            raise ValueError(
                f"lengths: got {lengths}, expected ints >= 0 that add up to {given.shape[0]} tokens"
            )
        place = _places(lengths, given.device)
        if position_ids is None:
            position_ids = place
        for name, x in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if x is not None and tuple(x.shape) != (given.shape[0],):
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected {(given.shape[0],)}"
                )
        width = max(lengths, default=0)
        indices = None
        if any(n != width for n in lengths):
            row = torch.from_numpy(np.repeat(np.arange(len(lengths)) * width, lengths))
            indices = row.to(given.device) + place
        shape = (len(lengths), width)
        offsets = _offsets(lengths, given.device)
        return cls(
            input_ids, token_type_ids, position_ids, inputs_embeds, offsets, lengths, shape, indices
        )

    def replace(self, **fields: Any) -> PackedBatch:
        """The same batch with some fields changed."""
        return dataclasses.replace(self, **fields)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with each of its tensors changed."""
        tensors = {k: x for k, x in self.__dict__.items() if isinstance(x, Tensor)}
        return self.replace(**{name: change(x) for name, x in tensors.items()})

    def pack(self, x: Tensor | None) -> Tensor | None:
        """(rows, S, …) -> (T, …): the real tokens of a padded tensor."""
        if x is None:
            return None
        if tuple(x.shape[:2]) != self.padded_shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {self.padded_shape} first")
        flat = x.reshape(-1, *x.shape[2:])
        if self.indices is None:
            return flat
        if flat.dim() == 2 and flat.is_floating_point():
            return gather_rows(flat, self.indices)
        return flat[self.indices]

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(T, …) -> (rows, S, …); padding holds ``fill``."""
        rows, columns = self.padded_shape
        if self.indices is None:
            return x.reshape(rows, columns, *x.shape[1:])
        total = rows * columns
        if x.dim() == 2 and x.is_floating_point() and fill == 0.0:
            padded = scatter_rows(x, self.indices, total)
        else:
            padded = x.new_full((total, *x.shape[1:]), fill).index_copy(0, self.indices, x)
        return padded.reshape(rows, columns, *x.shape[1:])

    def first(self, x: Tensor) -> Tensor:
        """(T, H) -> (B, H): the first token of each sequence ([CLS]); zeros for an empty one."""
        starts = self.cu_seqlens[:-1].long()
        if all(self.lengths):
            return gather_rows(x, starts)
        full = [b for b, n in enumerate(self.lengths) if n]
        full_rows = torch.tensor(full, dtype=torch.int64, device=x.device)
        return scatter_rows(gather_rows(x, starts[full_rows]), full_rows, self.num_sequences)


@dataclass(frozen=True, eq=False)
class TracedBatch(PackedBatch):
    """A padded batch whose lengths only the device learns: what a graph of torch.compile packs.

    There T is a size without a value, which no guard looks at, and one graph serves every mask.
    Only ``from_padded`` makes one.
    lengths: always (); what needs them on the host stays out of such graphs.
    occupied: (F,) int64, ascending: the sequences that hold a token; None when nothing is padded.
    """

    occupied: Tensor | None

    @classmethod
    def _layout(
        cls, mask: Tensor | None, rows: int, columns: int, device: torch.device
    ) -> TracedBatch:
        if mask is None:
            indices = occupied = None
            offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
        else:
            indices, offsets, occupied = packed_layout(mask)
        shape = rows, columns
        return cls(None, None, None, None, offsets, (), shape, indices, occupied)

    @property
    def max_seqlen(self) -> int:
        return self.padded_shape[1]

    @property
    def num_tokens(self) -> int:
        rows, columns = self.padded_shape
        return rows * columns if self.indices is None else self.indices.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.padded_shape[0]

    def first(self, x: Tensor) -> Tensor:
        starts = self.cu_seqlens[:-1].long()
        if self.occupied is None:
            return gather_rows(x, starts)
        first = gather_rows(x, starts[self.occupied])
        return scatter_rows(first, self.occupied, self.num_sequences)


def _lengths_and_indices(
    mask: Tensor | None, rows: int, columns: int
) -> tuple[tuple[int, ...], Tensor | None]:
    if mask is None:
        return (columns,) * rows, None
    real = mask != 0
    lengths = tuple(real.sum(1).tolist())
    if sum(lengths) == rows * columns:
        return lengths, None
    return lengths, real.flatten().nonzero().flatten()


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor((0, *accumulate(lengths)), dtype=torch.int32).to(device, non_blocking=True)


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Position of each token in its own sequence: 0 .. n - 1, again and again.

    By numpy: torch hands even a few numbers to all threads, and while other processes keep the
    cores busy each time costs milliseconds.
    """
    counts = np.array(lengths, np.int64)
    starts = np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(np.arange(len(starts)) - starts).to(device, non_blocking=True)
