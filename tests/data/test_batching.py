"""Batches: every example once, no budget exceeded, resumed anywhere with any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastbert.data import TokenBatches, batches_by_tokens, pack

MAX_TOKENS = 20
LENGTHS = st.lists(st.integers(0, MAX_TOKENS), min_size=1, max_size=60)
RANKS = st.integers(1, 5)


def all_ranks(lengths: list[int], world_size: int, **options: int) -> list[TokenBatches]:
    return [
        TokenBatches(lengths, MAX_TOKENS, seed=3, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]


def steps(ranks: list[TokenBatches], most: int = 10**9) -> Iterator[list[np.ndarray]]:
    """What the ranks take in each step of the epoch, with an advance behind each."""
    iterators = [iter(batches) for batches in ranks]
    for _ in range(min(most, len(ranks[0]))):
        yield [next(iterator) for iterator in iterators]
        for batches in ranks:
            batches.advance()


def examples(found: list[list[np.ndarray]]) -> list[int]:
    return [int(i) for step in found for batch in step for i in batch]


@settings(deadline=None)
@given(LENGTHS, RANKS, st.integers(1, 70))
def test_every_example_once_on_one_rank(lengths: list[int], world_size: int, bucket: int) -> None:
    assume(len(lengths) >= world_size)
    ranks = all_ranks(lengths, world_size, bucket=bucket)
    assert len({len(batches) for batches in ranks}) == 1
    taken = [list(batches) for batches in ranks]
    assert {len(batches) for batches in taken} == {len(ranks[0])}
    for batch in sum(taken, []):
        assert len(batch) > 0
        assert sum(lengths[i] for i in batch) <= MAX_TOKENS
    found = [int(i) for batches in taken for batch in batches for i in batch]
    assert len(found) == len(set(found))
    dropped = len(lengths) - len(found)
    assert dropped < world_size and (world_size > 1 or dropped == 0)
    if dropped:  # the last batches held fewer examples than there are ranks
        assert len(ranks[0]) == len(list(all_ranks(lengths, 1, bucket=bucket)[0])) // world_size


@settings(deadline=None)
@given(LENGTHS, RANKS, RANKS, st.integers(0, 10))
def test_resume_with_another_number_of_ranks(
    lengths: list[int], before: int, after: int, taken: int
) -> None:
    """No example comes twice in the epoch, and none is left out but what the docstring names."""
    assume(len(lengths) >= max(before, after))
    first = all_ranks(lengths, before)
    done = list(steps(first, taken))
    (state,) = {tuple(batches.state_dict().items()) for batches in first}  # the same on every rank
    second = all_ranks(lengths, after)
    for batches in second:
        batches.load_state_dict(dict(state))
    if second[0].epoch == 0:
        done += list(steps(second))
    else:
        assert second[0].position == 0
    found = examples(done)
    assert len(found) == len(set(found))
    assert len(lengths) - len(found) < max(before, after)
    assert {batches.epoch for batches in second} == {1}


@settings(deadline=None)
@given(LENGTHS, RANKS, st.integers(0, 25))
def test_resume_with_as_many_ranks_changes_nothing(
    lengths: list[int], world_size: int, taken: int
) -> None:
    """Over the ends of epochs, too."""
    assume(len(lengths) >= world_size)

    def run(ranks: list[TokenBatches], count: int) -> list[list[list[int]]]:
        found: list[list[list[int]]] = []
        while len(found) < count:
            for step in steps(ranks, count - len(found)):
                found.append([batch.tolist() for batch in step])
        return found

    uninterrupted = run(all_ranks(lengths, world_size), taken + 8)
    ranks, resumed = all_ranks(lengths, world_size), all_ranks(lengths, world_size)
    begun = run(ranks, taken)
    for batches, old in zip(resumed, ranks, strict=True):
        batches.load_state_dict(old.state_dict())
    assert begun + run(resumed, 8) == uninterrupted


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = np.random.default_rng(0).integers(1, 15, 500)

    def plan(seed: int, epoch: int, **ranks: int) -> list[list[int]]:
        batches = batches_by_tokens(lengths, MAX_TOKENS, seed=seed, epoch=epoch, bucket=64, **ranks)
        return [batch.tolist() for batch in batches]

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1) and plan(1, 0) != plan(2, 0)
    # Each step's batches are those that one rank would take one after the other.
    whole = plan(1, 0)
    ranks = [plan(1, 0, rank=r, world_size=3) for r in range(3)]
    for step in range(len(whole) // 3):
        assert [rank[step] for rank in ranks] == whole[3 * step : 3 * step + 3]


def test_buckets_sort_and_batches_are_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 4000)

    def spread(bucket: int) -> float:
        batches = batches_by_tokens(lengths, 500, seed=0, epoch=0, bucket=bucket)
        filled = [lengths[batch].sum() for batch in batches]
        assert np.mean(filled) > 500 - 50
        return float(np.mean([np.ptp(lengths[batch]) for batch in batches]))

    assert spread(1000) < 5 < 30 < spread(1)
    first = [lengths[b].mean() for b in batches_by_tokens(lengths, 500, seed=0, epoch=0)[:20]]
    assert np.std(first) > 5  # the batches themselves come in no order


def test_reading_ahead_does_not_move_the_state() -> None:
    lengths = [4, 5, 6, 7, 8, 9, 10] * 5
    batches = TokenBatches(lengths, MAX_TOKENS, seed=0)
    loader = DataLoader(range(len(lengths)), batch_sampler=batches, num_workers=1)  # type: ignore[arg-type]
    seen: list[int] = []
    for number, batch in enumerate(loader):
        seen += batch.tolist()
        if number == 2:
            break
        batches.advance()
    assert batches.state_dict()["position"] == 2
    assert seen == [int(i) for batch in list(TokenBatches(lengths, 20, seed=0))[:3] for i in batch]


def test_bad_arguments() -> None:
    for lengths, options, message in (
        ([5, 21], {}, "lengths: example 1 has 21 tokens, expected at most max_tokens, 20"),
        ([5, -1], {}, "lengths: got -1, expected 0 or more"),
        ([], {}, r"lengths: got shape \(0,\)"),
        ([[5]], {}, r"lengths: got shape \(1, 1\)"),
        ([5], {"world_size": 2}, "at least one for each of 2 ranks"),
        ([5, 5], {"rank": 2, "world_size": 2}, r"rank: got 2, expected 0 \.\. 1"),
        ([5], {"bucket": 0}, "bucket: got 0, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenBatches(lengths, MAX_TOKENS, seed=0, **options)  # type: ignore[arg-type]
    state = TokenBatches([5, 6], MAX_TOKENS, seed=0).state_dict()
    for other in (
        TokenBatches([5, 7], MAX_TOKENS, seed=0),
        TokenBatches([5, 6], MAX_TOKENS + 1, seed=0),
        TokenBatches([5, 6], MAX_TOKENS, seed=0, bucket=1),
    ):
        with pytest.raises(ValueError, match="state: is of other lengths"):
            other.load_state_dict(state)


def test_pack() -> None:
    made = [
        {"input_ids": np.array([2, 7, 3], np.uint16), "token_type_ids": np.array([0, 0, 1]),
         "labels": np.array([-100, 9, -100]), "weights": np.ones((3, 2), np.float32)},
        {"input_ids": np.array([], np.uint16), "token_type_ids": np.array([], np.int64),
         "labels": np.array([], np.int64), "weights": np.ones((0, 2), np.float32)},
        {"input_ids": np.array([2, 3], np.uint16), "token_type_ids": np.array([1, 1]),
         "labels": np.array([8, -100]), "weights": np.zeros((2, 2), np.float32)},
    ]  # fmt: skip
    batch, rest = pack(made)
    assert batch.lengths == (3, 0, 2) and batch.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert batch.input_ids is not None and batch.token_type_ids is not None
    assert batch.input_ids.tolist() == [2, 7, 3, 2, 3] and batch.input_ids.dtype == torch.int64
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 1]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert rest.keys() == {"labels", "weights"}
    assert rest["labels"].tolist() == [-100, 9, -100, 8, -100]
    assert rest["weights"].dtype == torch.float32 and rest["weights"].shape == (5, 2)

    positions = [{"input_ids": np.array([2, 3]), "position_ids": np.array([4, 5])}]
    moved, _ = pack(positions)
    assert moved.position_ids is not None and moved.position_ids.tolist() == [4, 5]
    assert moved.token_type_ids is None
    with pytest.raises(ValueError, match="examples: got none"):
        pack([])
    with pytest.raises(ValueError, match="examples: labels has not as many rows"):
        pack([{"input_ids": np.array([2, 3]), "labels": np.array([1])}])
