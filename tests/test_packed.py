"""PackedBatch: what goes in comes out, whatever the mask; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.packed import PackedBatch

bounded = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)


@st.composite
def masks(draw):
    """(B, S) of 0 and 1: any, padded left or right, full or empty, of any size from 0."""
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["any", "right", "left", "full", "empty"]))
    if kind == "any":
        return torch.randint(0, 2, (rows, columns), generator=generator)
    if kind in ("full", "empty"):
        return torch.full((rows, columns), int(kind == "full"))
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    return mask.flip(1) if kind == "left" else mask


lengths_lists = st.lists(st.integers(0, 6), max_size=6)


def ids_like(mask):
    return torch.arange(mask.numel()).view(mask.shape)


@bounded
@given(masks())
def test_padded_invariants(mask):
    batch = PackedBatch.from_padded(ids_like(mask), mask, token_type_ids=ids_like(mask) + 1)
    tokens = int(mask.sum())
    assert batch.lengths == tuple(mask.sum(1).tolist())
    assert (batch.num_tokens, batch.num_sequences) == (tokens, mask.shape[0])
    assert batch.max_seqlen == max(batch.lengths, default=0)
    assert batch.padded_shape == tuple(mask.shape)
    offsets = batch.cu_seqlens
    assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == tokens
    assert tuple(offsets.diff().tolist()) == batch.lengths
    # Row after row, left to right: ids are their own place among the padded ones.
    assert torch.equal(batch.input_ids, ids_like(mask)[mask == 1])
    assert torch.equal(batch.token_type_ids, batch.input_ids + 1)
    assert torch.equal(batch.position_ids, batch.input_ids % max(1, mask.shape[1]))
    if batch.indices is not None:
        assert torch.equal(batch.indices, batch.input_ids)


@bounded
@given(masks(), st.sampled_from([(), (3,), (2, 3)]), st.sampled_from([0.0, -7.0]))
def test_round_trip(mask, inner, fill):
    batch = PackedBatch.from_padded(ids_like(mask), mask)
    x = torch.randn(*mask.shape, *inner)
    packed = batch.pack(x)
    assert packed.shape == (batch.num_tokens, *inner)
    assert torch.equal(packed, x[mask == 1])
    padded = batch.unpack(packed, fill)
    assert padded.shape == x.shape
    assert torch.equal(padded[mask == 1], packed) and (padded[mask == 0] == fill).all()
    assert torch.equal(batch.pack(padded), packed)
    whole = batch.unpack(batch.pack(ids_like(mask)), -1)
    assert torch.equal(whole, torch.where(mask == 1, ids_like(mask), -1))


@bounded
@given(masks())
def test_gradients_go_back_the_way_they_came(mask):
    batch = PackedBatch.from_padded(ids_like(mask), mask)
    x = torch.randn(*mask.shape, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch.num_tokens, 3, dtype=torch.float64)
    batch.pack(x).mul(weights).sum().backward()
    assert torch.equal(x.grad, batch.unpack(weights))
    y = torch.randn(batch.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*mask.shape, 3, dtype=torch.float64)
    batch.unpack(y).mul(weights).sum().backward()
    assert torch.equal(y.grad, weights[mask == 1])


@bounded
@given(masks())
def test_nan_in_padding_stays_there(mask):
    x = torch.where((mask == 1)[..., None], torch.randn(*mask.shape, 2), float("nan"))
    batch = PackedBatch.from_padded(inputs_embeds=x, attention_mask=mask)
    assert batch.input_ids is None and batch.inputs_embeds.isfinite().all()
    assert batch.unpack(batch.inputs_embeds).isfinite().all()


@bounded
@given(lengths_lists)
def test_sequences_flat_and_padded_agree(lengths):
    sequences = [list(range(10 * i, 10 * i + n)) for i, n in enumerate(lengths)]
    batch = PackedBatch.from_sequences(sequences, token_type_ids=sequences)
    flat = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
    other = PackedBatch.from_flat(flat, lengths, token_type_ids=flat)
    width = max(lengths, default=0)
    mask = torch.arange(width)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    padded = torch.zeros(len(lengths), width, dtype=torch.int64).masked_scatter(mask, flat)
    third = PackedBatch.from_padded(padded, mask, token_type_ids=padded)
    for twin in (other, third):
        assert batch.lengths == twin.lengths and batch.padded_shape == twin.padded_shape
        for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens"):
            assert torch.equal(getattr(batch, name), getattr(twin, name)), name
        assert torch.equal(batch.unpack(flat), padded) and torch.equal(twin.unpack(flat), padded)


@bounded
@given(lengths_lists)
def test_first_tokens(lengths):
    batch = PackedBatch.from_flat(torch.arange(sum(lengths)), lengths)
    x = torch.randn(sum(lengths), 3, requires_grad=True)
    first = batch.first(x)
    assert first.shape == (len(lengths), 3)
    for row, part in zip(first, x.split(lengths) if lengths else (), strict=True):
        assert torch.equal(row, part[0] if len(part) else torch.zeros(3))
    first.sum().backward()
    assert x.grad.sum() == 3 * sum(n > 0 for n in lengths)


def test_flattened_positions_and_embeddings():
    positions = torch.tensor([5, 6, 0, 1, 2])
    embeds = torch.randn(5, 4)
    batch = PackedBatch.from_flat(None, [2, 3], position_ids=positions, inputs_embeds=embeds)
    assert batch.position_ids is positions and batch.inputs_embeds is embeds
    assert torch.equal(PackedBatch.from_flat(positions, [2, 3]).position_ids,
                       torch.tensor([0, 1, 0, 1, 2]))  # fmt: skip


def test_nothing_is_copied_without_padding():
    ids, x = torch.arange(6).view(2, 3), torch.randn(2, 3, 4)
    for mask in (None, torch.ones(2, 3)):
        batch = PackedBatch.from_padded(ids, mask)
        assert batch.indices is None
        assert batch.input_ids.data_ptr() == ids.data_ptr()
        assert batch.unpack(batch.pack(x)).data_ptr() == x.data_ptr()


def test_replace():
    batch = PackedBatch.from_sequences([[1, 2], [3]])
    changed = batch.replace(token_type_ids=batch.input_ids)
    assert changed.token_type_ids is batch.input_ids and batch.token_type_ids is None
    assert changed.cu_seqlens is batch.cu_seqlens


IDS = torch.ones(2, 3, dtype=torch.long)
FLAT = torch.ones(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedBatch.from_padded(), "exactly one of input_ids and inputs_embeds"),
        (lambda: PackedBatch.from_padded(FLAT), r"input_ids: got shape \(5,\)"),
        (lambda: PackedBatch.from_padded(IDS, IDS[:1]), r"attention_mask: got shape \(1, 3\)"),
        (lambda: PackedBatch.from_padded(IDS, token_type_ids=FLAT), "token_type_ids: got shape"),
        (lambda: PackedBatch.from_padded(IDS, position_ids=FLAT), "position_ids: got shape"),
        (lambda: PackedBatch.from_flat(FLAT, [2, 2]), r"lengths: got \(2, 2\).* 5 tokens"),
        (lambda: PackedBatch.from_flat(FLAT, [6, -1]), "lengths: got"),
        (lambda: PackedBatch.from_flat(FLAT, [5], position_ids=FLAT[:4]), "position_ids: got"),
        (lambda: PackedBatch.from_flat(None, []), "exactly one"),
        (lambda: PackedBatch.from_sequences([[1]], token_type_ids=[[0, 0]]), "token_type_ids"),
        (lambda: PackedBatch.from_padded(IDS).pack(torch.ones(3, 2)), r"got shape \(3, 2\)"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_tensors_go_to_another_device() -> None:
    batch = PackedBatch.from_sequences([[1, 2], [3]], token_type_ids=[[0, 1], [0]])
    moved = batch.to("meta")
    tensors = {name for name, x in batch.__dict__.items() if isinstance(x, torch.Tensor)}
    assert tensors == {"input_ids", "token_type_ids", "position_ids", "cu_seqlens", "indices"}
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.lengths, moved.padded_shape) == (batch.lengths, batch.padded_shape)
