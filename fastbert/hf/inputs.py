"""From the arguments of a Hugging Face forward to a PackedBatch, or to the reason why not.

Two forms are read: padded ``(B, S)`` tensors with a 2-D mask, and flattened batches, ``(1, T)``
with position ids that restart (``DataCollatorWithFlattening``) or with ``cu_seq_lens_q``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fastbert.hf.families import Family, find
from fastbert.packed import PackedBatch, TracedBatch

Tensor = torch.Tensor
_log = logging.getLogger("fastbert")

_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_OUTPUTS = ("output_hidden_states", "output_attentions", "return_dict")
_FLAT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What an encoder without a cache ignores in transformers too; Trainer sends num_items_in_batch.
_IGNORED = ("use_cache", "num_items_in_batch")
_KNOWN = frozenset((*_TENSORS, *_OUTPUTS, *_FLAT, *_IGNORED))


@dataclass(frozen=True)
class Request:
    """One call of a bare model, packed: what a task model hands to its backbone.

    padded: the tensors as they came, by name, for embeddings that are not fused.
    """

    batch: PackedBatch
    padded: Mapping[str, Tensor | None]
    hidden_states: bool
    attentions: bool


def refusal(config: Any, given: Mapping[str, Any]) -> str | None:
    """Why the packed path cannot serve these arguments; None when it can."""
    if getattr(config, "is_decoder", False):
        return "the model is a decoder (config.is_decoder)"
    if _is_exported():
        return "the model is being traced or exported"
    for name, value in given.items():
        if name not in _KNOWN and value is not None and value is not False:
            return f"the argument {name}"
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "attention_mask is not (B, S)"
    hidden = given.get("output_hidden_states")
    if hidden is not None and not isinstance(hidden, bool):
        return "output_hidden_states selects layers"
    return None


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 takes every graph for an export
def _is_exported() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def graph_obstacle(family: Family, backbone: Any, given: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments cannot be part of a graph of torch.compile; None when it can.

    Inside a graph no length is known on the host.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        shape = ids.shape
    elif embeds is not None:
        shape = embeds.shape[:-1]
    else:
        return None  # an error, of which ``read`` says what it is
    may_restart = given.get("position_ids") is not None and given.get("attention_mask") is None
    if given.get("cu_seq_lens_q") is not None or (may_restart and shape[:-1].numel() == 1):
        return "a flattened batch, whose lengths are read from its values"
    if given.get("output_attentions", getattr(backbone.config, "output_attentions", False)):
        return "output_attentions, which are computed one sequence at a time"
    if shape[-1] > _most_positions(family, backbone):
        return "more columns than position embeddings"
    return None


def read(family: Family, backbone: Any, given: Mapping[str, Any]) -> Request:
    """The request that the arguments of a bare model's forward make.

    Raises ValueError for shapes, positions or cu_seq_lens that do not fit, naming the argument.
    """
    padded = {name: given.get(name) for name in _TENSORS}
    ids, embeds = padded["input_ids"], padded["inputs_embeds"]
    source = ids if ids is not None else embeds
    for name in ("input_ids", "token_type_ids", "position_ids"):
        if padded[name] is not None:
            padded[name] = padded[name].long()  # type: ignore[union-attr]
    if source is None or source.dim() != (2 if ids is not None else 3):
        PackedBatch.from_padded(**padded)  # raises, with the reason
    assert source is not None
    lengths = _flattened_lengths(given, source)
    if lengths is None:
        mask = padded.pop("attention_mask")
        if padded["position_ids"] is None and family.positions_from_padding:
            padded["position_ids"] = _roberta_positions(backbone, ids, source)
        mask = None if mask is None else mask.to(source.device)
        kind = TracedBatch if torch.compiler.is_compiling() else PackedBatch
        batch = kind.from_padded(attention_mask=mask, **padded)
    else:
        del padded["attention_mask"]
        batch = _flat_batch(family, backbone, padded, lengths)
        assert batch.position_ids is not None
        padded["position_ids"] = batch.position_ids[None]
    if given.get("position_ids") is None:
        _check_positions(family, backbone, batch, flattened=lengths is not None)
    config = backbone.config
    return Request(
        batch,
        padded,
        bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False))),
        bool(given.get("output_attentions", getattr(config, "output_attentions", False))),
    )


def _flattened_lengths(given: Mapping[str, Any], source: Tensor) -> tuple[int, ...] | None:
    """The lengths of the sequences of a flattened batch; None for a padded one.

    Without offsets, a batch is flattened when its one row comes without a mask and each position is
    the one before plus 1 or the first one again, and both occur. Costs one wait for the device, and
    only for a single row that comes with position ids or offsets.
    """
    offsets, tokens = given.get("cu_seq_lens_q"), source.shape[1]
    if offsets is not None:
        return _checked_lengths(offsets, given, source)
    positions = given.get("position_ids")
    if source.shape[0] != 1 or positions is None or given.get("attention_mask") is not None:
        return None
    flat = positions.flatten().tolist()
    steps = [b - a for a, b in pairwise(flat)]
    starts = [i for i, step in enumerate(steps, 1) if step != 1]
    if not 0 < len(starts) < len(steps) or any(flat[i] != flat[0] for i in starts):
        return None
    return tuple(b - a for a, b in pairwise((0, *starts, tokens)))


def _checked_lengths(offsets: Any, given: Mapping[str, Any], source: Tensor) -> tuple[int, ...]:
    tokens = source.shape[1]
    if source.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q: needs a flattened batch of one row, got {source.shape[0]} rows"
        )
    if given.get("attention_mask") is not None:
        raise ValueError("attention_mask: expected None beside cu_seq_lens_q")
    bounds = torch.as_tensor(offsets).flatten().tolist()
    others = given.get("cu_seq_lens_k")
    if others is not None and torch.as_tensor(others).flatten().tolist() != bounds:
        raise ValueError("cu_seq_lens_k: expected the same offsets as cu_seq_lens_q")
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seq_lens_q: got {bounds}, expected offsets that ascend from 0 to {tokens}"
        )
    return tuple(b - a for a, b in pairwise(bounds))


def _flat_batch(
    family: Family, backbone: Any, padded: Mapping[str, Tensor | None], lengths: tuple[int, ...]
) -> PackedBatch:
    """A flattened batch: tokens packed already, (1, T) at the edges."""
    flat = {name: None if x is None else x.reshape(-1) for name, x in padded.items()}
    embeds = padded["inputs_embeds"]
    flat["inputs_embeds"] = None if embeds is None else embeds[0]
    tokens = sum(lengths)
    batch = PackedBatch.from_flat(flat.pop("input_ids"), lengths, **flat)
    positions = batch.position_ids
    assert positions is not None
    if family.positions_from_padding:
        positions = _restart_after_padding(backbone, positions, given=padded["position_ids"])
    return batch.replace(position_ids=positions, padded_shape=(1, tokens), indices=None)


def _restart_after_padding(backbone: Any, positions: Tensor, given: Tensor | None) -> Tensor:
    """RoBERTa's positions count from padding_idx + 1; DataCollatorWithFlattening's from 0.

    Position padding_idx is the zero row of the table and none below it was ever trained, so
    sequences of more than one token that start at 0 cannot be meant as they stand.
    """
    if not len(positions) or int(positions.min()) != 0:
        return positions
    if given is not None:
        _log.info("flattened position_ids start at 0: moved to where this family's positions start")
    return positions + backbone.embeddings.padding_idx + 1


def _roberta_positions(backbone: Any, ids: Tensor | None, source: Tensor) -> Tensor:
    """padding_idx + 1, + 2, … for tokens that are not padding, padding_idx for those that are.

    From embeddings nobody can tell which are padding: then they count on through every column.
    """
    padding = backbone.embeddings.padding_idx
    if ids is None:
        return torch.arange(padding + 1, padding + 1 + source.shape[1], device=source.device)[None]
    real = ids != padding
    return real.cumsum(1) * real + padding


def _check_positions(family: Family, backbone: Any, batch: PackedBatch, flattened: bool) -> None:
    """A sequence longer than the position table, found on the host."""
    limit = _most_positions(family, backbone)
    own_length = flattened or family.positions_from_padding
    longest = batch.max_seqlen if own_length else batch.padded_shape[1]
    if longest > limit:
        raise ValueError(
            f"input_ids: got a sequence of {longest} tokens, expected at most {limit} "
            "(the position embeddings of the model)"
        )


def _most_positions(family: Family, backbone: Any) -> int:
    """The longest sequence that the position table has rows for."""
    table = find(backbone, tuple(family.embedding_parts["position"].split(".")))
    rows = int(table.weight.shape[0])
    return rows - backbone.embeddings.padding_idx - 1 if family.positions_from_padding else rows
