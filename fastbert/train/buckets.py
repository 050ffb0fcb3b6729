"""Batches of any lengths as batches of few shapes, for what is recorded once a shape.

A bucket fixes the number of tokens, of sequences and the longest sequence that a recording allows.
A batch gets there by sequences of filler tokens behind its own. Sequences never see each other, so
no real token's output changes; what the filler's are, nobody reads. None of them is empty: every
sequence then has a first token for the pooler, and no shape depends on which have not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch

from fastbert.packed import PackedBatch

Tensor = torch.Tensor

_LEAST_TOKENS = 64
_LEAST_LENGTH = 32
# Above so many, filler costs more than recordings do: they are made once, and a batch as large as
# this takes longer to compute than the few more recordings take in all.
_MANY_TOKENS = 2**14


class Bucket(NamedTuple):
    """tokens, sequences: in all, filler among them.  max_seqlen: no sequence is longer."""

    tokens: int
    sequences: int
    max_seqlen: int


def bucket_of(tokens: int, sequences: int, longest: int, max_length: int) -> Bucket:
    """The bucket for a batch of ``sequences`` sequences, none empty, of ``tokens`` tokens in all.

    longest: its longest sequence.  max_length: the longest that the model takes.
    Tokens round up to one of eight sizes an octave (12.5% of filler at most, and a few tokens), of
    sixteen above 16,384 tokens (6.25%), sequences and the longest to powers of two: batches of
    about as many tokens each, as a token budget makes them, share a handful of buckets.
    In a bucket tokens > sequences, and every sequence of filler has a token at least and
    ``max_seqlen`` at most.
    """
    if not 1 <= sequences <= tokens:
        raise ValueError(f"sequences: got {sequences} of {tokens} tokens, expected none empty")
    if not longest <= max_length:
        raise ValueError(f"longest: got {longest}, expected at most max_length, {max_length}")
    max_seqlen = min(max_length, _power_of_two(max(longest, _LEAST_LENGTH)))
    if max_seqlen < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2")
    padded_sequences = _power_of_two(sequences)
    while True:
        fillers = padded_sequences - sequences
        padded = _round_tokens(max(tokens + fillers, padded_sequences + 1))
        if padded - tokens <= fillers * max_seqlen:
            return Bucket(padded, padded_sequences, max_seqlen)
        padded_sequences *= 2


def _power_of_two(n: int) -> int:
    """The least one that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def _round_tokens(n: int) -> int:
    sizes = 16 if n > _MANY_TOKENS else 8  # an octave: from half the power of two up to it
    step = max(_LEAST_TOKENS, _power_of_two(n) // (2 * sizes))
    return -(-n // step) * step


@dataclass(frozen=True, eq=False)
class BucketBatch(PackedBatch):
    """A batch with filler. bucket: whose shapes it has.  real: its own tokens and sequences."""

    bucket: Bucket
    real: tuple[int, int]

    @property
    def max_seqlen(self) -> int:
        return self.bucket.max_seqlen


class Pad(NamedTuple):
    """How a tensor beside the batch grows. per: "token" for (T, …), "sequence" for (B, …).
    fill: the value of the rows that filler gets."""

    per: str
    fill: float


def pad_batch(batch: PackedBatch, bucket: Bucket) -> BucketBatch:
    """``batch`` with sequences of filler behind its own, up to ``bucket``.

    Filler has token id 0, token type 0 and positions from 0. On the device of the batch, without
    waiting for it.
    """
    if batch.input_ids is None or batch.position_ids is None:
        raise ValueError("batch: got no input_ids or no position_ids, expected both")
    tokens, sequences = batch.num_tokens, batch.num_sequences
    ids, device = batch.input_ids, batch.input_ids.device
    fillers = bucket.sequences - sequences
    lengths = _shared_out(bucket.tokens - tokens, fillers)
    filler = PackedBatch.from_flat(ids.new_zeros(bucket.tokens - tokens), lengths)
    assert filler.position_ids is not None
    types = batch.token_type_ids
    return BucketBatch(
        input_ids=torch.cat([ids, ids.new_zeros(bucket.tokens - tokens)]),
        token_type_ids=None if types is None else pad_rows(types, bucket.tokens, 0),
        position_ids=torch.cat([batch.position_ids, filler.position_ids]),
        inputs_embeds=None,
        cu_seqlens=torch.cat([batch.cu_seqlens, filler.cu_seqlens[1:].to(device) + tokens]),
        lengths=(*batch.lengths, *lengths),
        padded_shape=(bucket.sequences, bucket.max_seqlen),
        indices=None,
        bucket=bucket,
        real=(tokens, sequences),
    )


def _shared_out(tokens: int, sequences: int) -> list[int]:
    """Lengths that add up to ``tokens``, as equal as can be."""
    if not sequences:
        return []
    least, more = divmod(tokens, sequences)
    return [least + 1] * more + [least] * (sequences - more)


def pad_tensor(x: Tensor, pad: Pad, bucket: Bucket) -> Tensor:
    """``x`` with rows of ``pad.fill`` behind its own, as many as the bucket has tokens or
    sequences."""
    return pad_rows(x, bucket.tokens if pad.per == "token" else bucket.sequences, pad.fill)


def pad_rows(x: Tensor, rows: int, fill: float) -> Tensor:
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), fill)])


def without_filler(outputs: Any, batch: BucketBatch) -> Any:
    """What a function of ``batch`` returned, without the rows of filler, copied.

    outputs: tensors, in tuples, lists, dicts and dataclasses. One with a row for each token or each
    sequence loses those of filler; any other is copied as it is.
    """
    tokens, sequences = batch.real

    def cut(x: Tensor) -> Tensor:
        if x.dim() and x.shape[0] == batch.bucket.tokens:
            x = x[:tokens]
        elif x.dim() and x.shape[0] == batch.bucket.sequences:
            x = x[:sequences]
        return x.clone()

    return _map(cut, outputs)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, x) for key, x in value.items()}
    if isinstance(value, tuple | list):
        parts = [_map(function, x) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _map(function, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **changed)
    return value


def labelled_rows(labels: Tensor, count: int, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """The rows that have a label, in a number that does not depend on the labels.

    labels: (T,) int64, ``ignored`` where there is none.  count: how many rows to return, at least
    as many as have a label.
    Returns rows (count,), ascending, and their labels (count,): all labelled rows, and other ones,
    whose label is ``ignored``, to make up the number. Nothing waits for the device.
    Raises ValueError on CPU for more labels than ``count``; on a GPU those in excess are left out.
    """
    if count > labels.shape[0]:
        raise ValueError(f"count: got {count}, expected at most {labels.shape[0]}, one a token")
    unlabelled = labels == ignored
    if labels.device.type == "cpu" and count < (found := int((~unlabelled).sum())):
        raise ValueError(f"count: got {count}, expected at least {found}, one a label")
    rows = unlabelled.to(torch.uint8).argsort(stable=True)[:count].sort().values
    return rows, labels[rows]
