"""Examples of many lengths to batches of about as many tokens each, shared out among ranks.

One plan an epoch, the same in every process, made of (seed, epoch) alone:

1. shuffle the examples;
2. sort each window of ``bucket`` of them by length, so that neighbours are about as long;
3. cut the row, from its start, into batches of at most ``max_tokens`` tokens;
4. shuffle the batches.

Step t of W ranks takes W consecutive batches of the plan, one a rank: no two ranks see the same
example, and all take as many steps. The plan does not depend on W, so that a run may go on with
another number of ranks from the batch that it had come to. Where the batches that are left are no
multiple of W, the last few are halved until there are W.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from fastbert.packed import PackedBatch

Array = np.ndarray
Tensor = torch.Tensor

BUCKET = 4096  # examples, sorted together


def batches_by_tokens(
    lengths: Sequence[int] | Array,
    max_tokens: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    bucket: int = BUCKET,
) -> list[Array]:
    """The batches of one epoch for one rank: int64 arrays of the numbers of examples.

    lengths: of each example, in tokens.  max_tokens: the most in a batch.  bucket: examples that
    are sorted by length together; 1 for no sorting.
    Every example comes once in the epoch, on one of the ranks; see ``TokenBatches`` for the
    exception. Raises ValueError for an example longer than ``max_tokens``.
    """
    batches = TokenBatches(
        lengths, max_tokens, seed=seed, rank=rank, world_size=world_size, bucket=bucket
    )
    batches.epoch = epoch
    return list(batches)


class TokenBatches:
    """The batches of epoch after epoch for one rank; a ``batch_sampler`` for a torch DataLoader.

    Iterating gives what is left of the current epoch, and changes nothing. ``advance`` notes that a
    batch has been trained on: it is called after every step, and moves to the next epoch behind the
    last. So the state is right however far a loader reads ahead:

        for batch in DataLoader(examples, batch_sampler=batches, collate_fn=collate):
            train(batch)
            batches.advance()
            ... save(batches.state_dict()) ...

    Nothing is dropped, except that where the last few batches of an epoch hold fewer examples than
    there are ranks (which takes examples nearly as long as ``max_tokens``) these are left out: at
    most ``world_size - 1``, other ones every epoch. With one rank that cannot happen.

    Attributes: epoch, from 0; position, in batches of the epoch's plan that are trained on by all
    ranks together.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Array,
        max_tokens: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        bucket: int = BUCKET,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        _check(self.lengths, max_tokens, rank, world_size, bucket)
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.bucket = bucket
        self.epoch = 0
        self.position = 0
        self._planned: tuple[tuple[int, int] | None, list[Array]] = None, []

    def __iter__(self) -> Iterator[Array]:
        plan, end = self._plan(), self._end_of_whole_steps()
        has_last_step = self._has_last_step(end)  # asked now: ``advance`` may begin an epoch
        for first in range(self.position, end, self.world_size):
            yield plan[first + self.rank]
        if has_last_step:
            yield _deal(plan[end:], self.world_size)[self.rank]

    def __len__(self) -> int:
        """Batches that are left in the epoch for this rank, as for every other."""
        end = self._end_of_whole_steps()
        return (end - self.position) // self.world_size + self._has_last_step(end)

    def advance(self) -> None:
        """Note that every rank has trained on one more batch."""
        self.position = min(self.position + self.world_size, len(self._plan()))
        self._begin_epoch_if_done()

    def _begin_epoch_if_done(self) -> None:
        if len(self) == 0:
            self.epoch += 1
            self.position = 0

    def state_dict(self) -> dict[str, int]:
        """What ``load_state_dict`` goes on from: host ints, the same on every rank."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "crc32": self._digest(),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken, whatever the number of ranks then and now.

        Raises ValueError if it is of other examples, another ``max_tokens`` or ``bucket``.
        """
        if state["crc32"] != self._digest():
            raise ValueError(
                "state: is of other lengths of examples, another max_tokens or another bucket"
            )
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.position = state["position"]
        self._begin_epoch_if_done()

    def _digest(self) -> int:
        """CRC-32 of all that a plan is made of, but seed and epoch."""
        sizes = np.array([self.max_tokens, self.bucket, len(self.lengths)], np.int64)
        return zlib.crc32(self.lengths.tobytes(), zlib.crc32(sizes.tobytes()))

    def _end_of_whole_steps(self) -> int:
        """The batch of the plan up to which steps go that take one a rank."""
        left = len(self._plan()) - self.position
        return self.position + left - left % self.world_size

    def _has_last_step(self, end: int) -> bool:
        """Whether the batches of the plan from ``end`` on hold an example for every rank."""
        return sum(map(len, self._plan()[end:])) >= self.world_size

    def _plan(self) -> list[Array]:
        made_of = self.seed, self.epoch
        if self._planned[0] != made_of:
            random = np.random.default_rng(made_of)
            order = _sorted_in_windows(random, self.lengths, self.bucket)
            plan = _cut(order, self.lengths, self.max_tokens)
            random.shuffle(plan)
            self._planned = made_of, plan
        return self._planned[1]


def _check(lengths: Array, max_tokens: int, rank: int, world_size: int, bucket: int) -> None:
    if lengths.ndim != 1 or len(lengths) < world_size:
        raise ValueError(
            f"lengths: got shape {lengths.shape}, expected at least one for each of {world_size} "
            "ranks"
        )
    if lengths.min() < 0:
        raise ValueError(f"lengths: got {lengths.min()}, expected 0 or more")
    if lengths.max() > max_tokens:
        raise ValueError(
            f"lengths: example {lengths.argmax()} has {lengths.max()} tokens, expected at most "
            f"max_tokens, {max_tokens}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 .. {world_size - 1}")
    if bucket < 1:
        raise ValueError(f"bucket: got {bucket}, expected 1 or more")


def _sorted_in_windows(random: np.random.Generator, lengths: Array, bucket: int) -> Array:
    """All examples in random order, each window of ``bucket`` sorted by length."""
    order = random.permutation(len(lengths))
    window = np.arange(len(order)) // bucket
    return order[np.lexsort((lengths[order], window))]


def _cut(order: Array, lengths: Array, max_tokens: int) -> list[Array]:
    """Consecutive parts of ``order``, each as long as ``max_tokens`` allows."""
    ends = np.cumsum(lengths[order])
    parts = []
    first = before = 0
    while first < len(order):
        end = int(np.searchsorted(ends, before + max_tokens, side="right"))
        parts.append(order[first:end])
        first, before = end, int(ends[end - 1])
    return parts


def _deal(batches: list[Array], ranks: int) -> list[Array]:
    """Fewer batches than ranks as a batch a rank: the one of the most examples is halved, again and
    again. A batch is sorted by length: taking every other example halves its tokens too."""
    dealt = list(batches)
    while len(dealt) < ranks:
        largest = max(range(len(dealt)), key=lambda i: len(dealt[i]))
        batch = dealt[largest]
        dealt[largest] = batch[::2]
        dealt.append(batch[1::2])
    return dealt


def pack(
    examples: Sequence[Mapping[str, Array]], device: torch.device | str = "cpu"
) -> tuple[PackedBatch, dict[str, Tensor]]:
    """Examples end to end, without padding: (batch, what else they hold).

    examples: arrays by name, the same names in each. ``input_ids`` (n,) and, if they are there,
    ``token_type_ids`` and ``position_ids`` become the batch's. Every other array, of n rows for the
    n tokens of its example, as labels are, is joined to a tensor of T rows.
    Integers become int64. Raises ValueError for an array of another length than its example.
    """
    if not examples:
        raise ValueError("examples: got none, expected one or more")
    names = examples[0].keys()
    lengths = [len(example["input_ids"]) for example in examples]
    joined: dict[str, Tensor] = {}
    for name in names:
        arrays = [np.asarray(example[name]) for example in examples]
        if [len(array) for array in arrays] != lengths:
            raise ValueError(f"examples: {name} has not as many rows as input_ids has tokens")
        array = np.concatenate(arrays)
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        joined[name] = torch.from_numpy(array).to(device)
    fields = {name: joined.pop(name, None) for name in ("token_type_ids", "position_ids")}
    return PackedBatch.from_flat(joined.pop("input_ids"), lengths, **fields), joined
