"""Calibration data in any of its forms, as packed batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastbert.packed import PackedBatch

Tensor = torch.Tensor

_TOKENS = 2048  # of texts and lists of ids, in one batch
_RANDOM_SEQUENCES, _RANDOM_TOKENS = 16, 64


def as_batches(data: Iterable[Any] | None, facts: Mapping[str, Any]) -> list[PackedBatch]:
    """Texts, lists of token ids, dicts of padded tensors or PackedBatches, as packed batches.

    facts: position_offset, max_length, lower_case and tokenizer_json of the model.
    Raises ValueError for anything else, for no data, and for texts without a tokenizer.
    """
    if data is None or isinstance(data, str | Mapping | PackedBatch):
        raise ValueError(f"calibration: got {type(data).__name__}, expected a list of inputs")
    items, batches = [], []
    for item in data:
        if isinstance(item, PackedBatch):
            batches.append(item)
        elif isinstance(item, Mapping):
            batches.append(_from_padded(item, facts["position_offset"]))
        elif isinstance(item, str) or _is_ids(item):
            items.append(item)
        else:
            raise ValueError(
                f"calibration: got an item of {type(item).__name__}, expected texts, lists of "
                "token ids, dicts with input_ids or PackedBatches"
            )
    batches += _from_lists(_tokenised(items, facts), facts["position_offset"])
    batches = [batch for batch in batches if batch.num_tokens]
    if not batches:
        raise ValueError("calibration: got no tokens, expected a few hundred typical inputs")
    return batches


def random_batches(vocab: int, facts: Mapping[str, Any]) -> list[PackedBatch]:
    """A few sequences of random tokens between the tokenizer's special ones, always the same.

    They find the channels of LayerNorm outputs that are large for every token.
    """
    generator = torch.Generator().manual_seed(0)
    before, after = _special_tokens(facts["tokenizer_json"])
    longest = max(1, min(_RANDOM_TOKENS, facts["max_length"]) - len(before) - len(after))
    pairs = []
    for _ in range(_RANDOM_SEQUENCES):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        middle = torch.randint(0, vocab, (length,), generator=generator).tolist()
        ids = [*before, *middle, *after]
        pairs.append((ids, [0] * len(ids)))
    return list(_from_lists(pairs, facts["position_offset"]))


def _special_tokens(tokenizer_json: str | None) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    if tokenizer_json is None:
        return [], []
    ids = _tokenizer(tokenizer_json).encode("").ids
    return ids[:1], ids[1:]


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    return tokenizer


def _is_ids(item: Any) -> bool:
    return isinstance(item, Sequence) and all(isinstance(i, int) for i in item)


def _from_padded(inputs: Mapping[str, Any], position_offset: int) -> PackedBatch:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    given = {n: torch.as_tensor(inputs[n]) for n in names if inputs.get(n) is not None}
    source = given.get("input_ids", given.get("inputs_embeds"))
    if source is None:
        raise ValueError("calibration: got a dict without input_ids")
    if "input_ids" in given and source.dim() == 3:  # multiple choice
        given = {name: x.flatten(0, 1) for name, x in given.items()}
        source = given["input_ids"]
    if position_offset and "position_ids" not in given:
        mask = given.get("attention_mask", torch.ones(source.shape[:2], dtype=torch.int64))
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0) + position_offset
    return PackedBatch.from_padded(**given)


def _tokenised(items: list[Any], facts: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, token types) of each item, no longer than the model takes."""
    limit = facts["max_length"]
    texts = [item for item in items if isinstance(item, str)]
    encodings: Iterator[Any] = iter(())
    if texts:
        if facts["tokenizer_json"] is None:
            raise ValueError(
                "tokenizer: expected one for calibration texts: the model came from no folder that "
                "holds a tokenizer.json"
            )
        tokenizer = _tokenizer(facts["tokenizer_json"])
        tokenizer.enable_truncation(limit)
        encodings = iter(
            tokenizer.encode_batch([t.lower() if facts["lower_case"] else t for t in texts])
        )
    found = []
    for item in items:
        if isinstance(item, str):
            encoding = next(encodings)
            found.append((encoding.ids, encoding.type_ids))
        else:
            found.append((list(item[:limit]), [0] * len(item[:limit])))
    return found


def _from_lists(
    pairs: list[tuple[list[int], list[int]]], position_offset: int
) -> Iterator[PackedBatch]:
    group: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for pair in pairs:
        if group and tokens + len(pair[0]) > _TOKENS:
            yield _packed(group, position_offset)
            group, tokens = [], 0
        group.append(pair)
        tokens += len(pair[0])
    if group:
        yield _packed(group, position_offset)


def _packed(group: list[tuple[list[int], list[int]]], position_offset: int) -> PackedBatch:
    ids, types = zip(*group, strict=True)
    batch = PackedBatch.from_sequences(ids, token_type_ids=types)
    assert batch.position_ids is not None
    return batch.replace(position_ids=batch.position_ids + position_offset)
