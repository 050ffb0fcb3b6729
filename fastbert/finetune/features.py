"""Rows of a table as a model's inputs: token ids in windows, joined end to end, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from fastbert.data.tokenizer import works_piecewise

Array = np.ndarray

_ROWS = 2000  # tokenised at a time: the library's own objects take some 200 bytes a token


class Features(Dataset[dict[str, Array]]):
    """A map-style data set of examples, for a DataLoader with TokenBatches and ``Task.collate``.

    per_token: flat (T, …) arrays, T tokens of all F features end to end: ``input_ids``,
        ``token_type_ids`` and, for some tasks, ``labels``.
    per_feature: arrays of F rows, such as ``labels``.
    notes: flat (T, …) arrays that ``Task.decode`` reads and no model sees.
    lengths: (F,) int64, tokens of each.  row: (F,) int64, the row of the table each is of.
    truncated: rows that lost tokens.  windowed: rows that became more than one feature.
    """

    def __init__(
        self,
        lengths: Array,
        row: Array,
        per_token: Mapping[str, Array],
        per_feature: Mapping[str, Array],
        *,
        notes: Mapping[str, Array] | None = None,
        truncated: int = 0,
    ) -> None:
        self.lengths = lengths
        self.row = row
        self.per_token = dict(per_token)
        self.per_feature = dict(per_feature)
        self.notes = dict(notes or {})
        self.truncated = truncated
        self._ends = np.cumsum(lengths)

    @property
    def windowed(self) -> int:
        return int((np.unique(self.row, return_counts=True)[1] > 1).sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Raises IndexError for an index outside of 0 .. F - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"feature {index} is not among the {len(self)}")
        tokens = self._tokens(index)
        example = {name: array[tokens] for name, array in self.per_token.items()}
        example.update((name, array[index]) for name, array in self.per_feature.items())
        return example

    def note(self, name: str, index: int) -> Array:
        """(n, …): what ``notes`` hold of a feature's tokens."""
        return self.notes[name][self._tokens(index)]

    def _tokens(self, index: int) -> slice:
        end = self._ends[index]
        return slice(end - self.lengths[index], end)


class Ragged(NamedTuple):
    """Lists of different lengths: list i is values[starts[i] : starts[i] + lengths[i]]."""

    values: Array
    starts: Array
    lengths: Array

    @classmethod
    def joined(cls, values: Array, lengths: Array) -> Ragged:
        """Lists that stand end to end."""
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        return cls.joined(values, lengths)


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Ragged:
    """Token ids of each text, without special tokens."""
    if works_piecewise(tokenizer):
        # What stands between blanks is tokenised once: several times as fast.
        parts = [text.split(" ") for text in texts]
        tokens = tokenise_words(list(chain.from_iterable(parts)), tokenizer)
        words = Ragged.joined(np.empty(0), np.fromiter(map(len, parts), np.int64, len(parts)))
        ends = np.concatenate(([0], np.cumsum(tokens.lengths)))
        lengths = ends[words.starts + words.lengths] - ends[words.starts]
        return Ragged.joined(tokens.values, lengths)
    ids: list[list[int]] = []
    for first in range(0, len(texts), _ROWS):
        part = list(texts[first : first + _ROWS])
        ids += [e.ids for e in tokenizer.encode_batch_fast(part, add_special_tokens=False)]
    return Ragged.of(ids)


def tokenise_words(words: Sequence[str], tokenizer: Tokenizer) -> Ragged:
    """Token ids of each word, end to end. A word that comes again is looked up."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    unseen = list(numbers)
    ids, owner = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for first in range(0, len(unseen), _ROWS):
        part = unseen[first : first + _ROWS]
        encoding = tokenizer.encode(part, is_pretokenized=True, add_special_tokens=False)
        ids.append(np.array(encoding.ids, np.int32))
        owner.append(first + np.array(encoding.word_ids, np.int64))  # the word that each is of
    lengths = np.bincount(np.concatenate(owner), minlength=len(unseen))
    distinct = Ragged.joined(np.concatenate(ids), lengths)
    slots = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
    source = ranges(distinct.starts[slots], distinct.lengths[slots])
    return Ragged.joined(distinct.values[source], distinct.lengths[slots])


def tokenise_with_offsets(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Ragged, Array]:
    """Token ids of each text, without special tokens, and of each token, flat, the characters
    start .. end - 1 of its text that it stands for: (T, 2) int32."""
    ids: list[list[int]] = []
    offsets: list[Array] = []
    for first in range(0, len(texts), _ROWS):
        part = list(texts[first : first + _ROWS])
        for encoding in tokenizer.encode_batch(part, add_special_tokens=False):
            ids.append(encoding.ids)
            offsets.append(np.array(encoding.offsets, np.int32).reshape(-1, 2))
    return Ragged.of(ids), np.concatenate(offsets or [np.empty((0, 2), np.int32)])


# --- windows ----------------------------------------------------------------------------------


class Frame(NamedTuple):
    """What a tokenizer puts around one text, or around two: ids and token types.

    before, between, after: (n,) ids of special tokens; between is empty for one text.
    types: token type of the parts before, first, between, second, after.
    """

    before: Array
    between: Array
    after: Array
    types: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, pair: bool) -> Frame:
        """Raises ValueError for a tokenizer that puts nothing before a text, where BERT's [CLS]
        is what is read."""
        encoding = tokenizer.encode("a", "a" if pair else None)
        ids, types = np.array(encoding.ids, np.int32), encoding.type_ids
        of_first = [i for i, s in enumerate(encoding.sequence_ids) if s == 0]
        of_second = [i for i, s in enumerate(encoding.sequence_ids) if s == 1] or of_first
        if of_first[0] == 0:
            raise ValueError("tokenizer: puts no special token before a text, expected [CLS]")
        behind_first, behind = of_first[-1] + 1, of_second[-1] + 1
        between = ids[behind_first : of_second[0]]
        # The part between has its last token's type, which matters only where it has tokens.
        places = (0, of_first[0], of_second[0] - 1, of_second[0], min(behind, len(ids) - 1))
        before, first, middle, second, after = (types[i] for i in places)
        frame_types = (before, first, middle, second, after)
        return cls(ids[: of_first[0]], between, ids[behind:], frame_types)

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True, eq=False)
class Windows:
    """W sequences, of N rows.

    row: (W,), the row that each is of.  lengths: (W,).  input_ids, token_type_ids: (T,).
    begin, size: (W,), the tokens begin .. begin + size - 1 of the text that slides are in it.
    truncated: (N,) bool, rows that lost tokens.
    source: (T,), where each token is among the frame's, all first texts' and all second texts', end
        to end.  frame_size: how many tokens the frame has.
    """

    row: Array
    lengths: Array
    input_ids: Array
    token_type_ids: Array
    begin: Array
    size: Array
    truncated: Array
    source: Array
    frame_size: int

    def of_text(self, values: Array, other: int, before: int = 0) -> Array:
        """(T, …): ``values`` of the tokens of a text, and ``other`` everywhere else.

        values: of all tokens of the first texts or, with ``before`` the number of these, of those
        of the second, as the Ragged that was given has them.
        """
        place = self.source - self.frame_size - before
        inside = (place >= 0) & (place < len(values))
        out = np.full((len(place), *values.shape[1:]), other, values.dtype)
        out[inside] = values[place[inside]]
        return out


def windows(
    first: Ragged,
    second: Ragged | None,
    frame: Frame,
    max_length: int,
    stride: int | None,
    *,
    sliding: str = "longer",
) -> Windows:
    """All tokens of each text, or pair, at most ``max_length`` at a time.

    Of a pair one text stands in every window, cut to half of the room if it is longer, and the
    other slides: the ``longer`` one, or always the ``second``.
    stride: tokens that neighbouring windows share; None: a quarter of the room that slides, at
        most a quarter of ``max_length``.

    Raises ValueError for a ``max_length`` without room for text, and a stride without room for
    more than itself.
    """
    room = max_length - frame.size
    if room < (1 if second is None else 2):
        raise ValueError(
            f"max_length: got {max_length}, expected more than the {frame.size} special tokens"
        )
    if second is None:
        slides, fixed = first.lengths, np.zeros_like(first.lengths)
        first_slides = np.ones(len(slides), bool)
    else:
        both = first.lengths + second.lengths
        first_slides = np.zeros(len(both), bool)
        if sliding == "longer":
            first_slides = first.lengths > second.lengths
        slides = np.where(first_slides, first.lengths, second.lengths)
        fixed = both - slides
    cut = (slides + fixed > room) & (fixed > room // 2)
    fixed = np.where(cut, room // 2, fixed)
    free = room - fixed
    if stride is None:
        shared = np.minimum(max_length // 4, free // 4)
    else:
        least = room - (0 if second is None else room // 2)
        if not 0 <= stride < least:
            raise ValueError(
                f"stride: got {stride}, expected 0 .. {least - 1}: less than the {least} tokens "
                f"that a window of {max_length} surely has room for"
            )
        shared = np.full(len(free), stride)
    row, begin, size = _slide(slides, free, shared)

    # Every window is made of five parts, each a range of the arrays below, put end to end.
    pool = [frame.before, frame.between, frame.after, first.values]
    if second is not None:
        pool.append(second.values)
    at = np.cumsum([0, *map(len, pool)])
    parts = [
        (at[0], len(frame.before)),
        _part_of(first, at[3], first_slides, fixed, row, begin, size),
        (at[1], len(frame.between)),
        (at[4], 0)
        if second is None
        else _part_of(second, at[4], ~first_slides, fixed, row, begin, size),
        (at[2], len(frame.after)),
    ]
    starts, sizes = (
        np.stack([np.broadcast_to(part[i], row.shape) for part in parts], 1) for i in (0, 1)
    )
    source = ranges(starts.ravel(), sizes.ravel())
    types = np.tile(np.array(frame.types, np.int8), len(row)).repeat(sizes.ravel())
    return Windows(
        row, sizes.sum(1), np.concatenate(pool)[source], types, begin, size, cut, source, frame.size
    )


def _part_of(
    texts: Ragged, at: int, slides: Array, fixed: Array, row: Array, begin: Array, size: Array
) -> tuple[Array, Array]:
    """(start, length) of a text's part of each window: what has come by, or all that is fixed."""
    moved = slides[row]
    return (
        at + texts.starts[row] + np.where(moved, begin, 0),
        np.where(moved, size, fixed[row]),
    )


def shorten(first: Ragged, second: Ragged, room: int) -> tuple[Ragged, Ragged, Array]:
    """Pairs of at most ``room`` tokens, and which of them lost some: (N,) bool.

    The longer text loses its last tokens until it is as long as the other, then both do.
    """
    both = first.lengths + second.lengths
    shorter = np.minimum(np.minimum(first.lengths, second.lengths), room // 2)
    is_first = first.lengths > second.lengths
    cut = both > room

    def kept(texts: Ragged, longer: Array) -> Ragged:
        lengths = np.where(cut, np.where(longer, room - shorter, shorter), texts.lengths)
        return texts._replace(lengths=lengths)

    return kept(first, is_first), kept(second, ~is_first), cut


def _slide(lengths: Array, room: Array, shared: Array) -> tuple[Array, Array, Array]:
    """(row, begin, size) of the windows of ``room`` tokens over texts of ``lengths``."""
    step = np.maximum(room - shared, 1)  # less only where one window holds all
    more = np.maximum(lengths - room, 0)
    count = 1 + -(-more // step)
    row = np.arange(len(lengths)).repeat(count)
    begin = (np.arange(len(row)) - (np.cumsum(count) - count)[row]) * step[row]
    return row, begin, np.minimum(room[row], lengths[row] - begin)


def ranges(starts: Array, lengths: Array) -> Array:
    """starts[0], starts[0] + 1, … (lengths[0] of them), then those from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
