"""Examples to batches: packed for ``PretrainingModel``, padded for Hugging Face's models.

Among the targets of an objective an array whose name ends in ``index`` or ``place`` holds places of
tokens in its example, counted from 0. In a batch

    …place   are places among the packed tokens,
    …index   are rows of the encoder's output. The encoder computes only the rows that some index
             names: ``PretrainingBatch.rows``.

Every other array is joined along its first axis as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastbert.nn.heads import IGNORED
from fastbert.packed import PackedBatch
from fastbert.pretrain.examples import NONE, Example

Array = np.ndarray
Tensor = torch.Tensor
Targets = dict[str, Tensor]

# Computing some rows only takes gathering them: not worth it for the few that nobody asks for.
_MOST_ROWS = 0.9


@dataclass(frozen=True, eq=False)
class PretrainingBatch:
    """Packed inputs, and what is to be predicted.

    inputs: B sequences, T tokens.
    rows: (R,) int64, ascending: the packed tokens whose final states objectives use; None for all.
    targets: by objective, tensors by name; see above.
    visibility: (T, 3) int64 or None; see ``fastbert.pretrain.encode.attention_bias``.
    """

    inputs: PackedBatch
    rows: Tensor | None
    targets: dict[str, Targets]
    visibility: Tensor | None = None

    def replace(self, **fields: Any) -> PretrainingBatch:
        """The same batch with some fields changed."""
        return replace(self, **fields)

    def places(self, index: Tensor) -> Tensor:
        """The packed tokens of rows of the encoder's output."""
        return index if self.rows is None else self.rows[index]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PretrainingBatch:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PretrainingBatch:
        """What a DataLoader calls for ``pin_memory=True``."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PretrainingBatch:
        def changed(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        names = (
            "input_ids",
            "token_type_ids",
            "position_ids",
            "inputs_embeds",
            "cu_seqlens",
            "indices",
        )
        return PretrainingBatch(
            self.inputs.replace(**{name: changed(getattr(self.inputs, name)) for name in names}),
            changed(self.rows),
            {
                objective: {name: change(x) for name, x in targets.items()}
                for objective, targets in self.targets.items()
            },
            changed(self.visibility),
        )


def collate(examples: Sequence[Example]) -> PretrainingBatch:
    """The batch of prepared examples, on CPU: a ``collate_fn`` for a torch DataLoader.

    Raises ValueError for no examples and for examples of different objectives.
    """
    if not examples:
        raise ValueError("examples: got none, expected one or more")
    lengths = [len(example) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    positions = None
    if any(example.position_ids is not None for example in examples):
        positions = _joined([_positions(example) for example in examples])
    inputs = PackedBatch.from_flat(
        _joined([example.ids for example in examples]),
        lengths,
        token_type_ids=_joined([example.token_type_ids for example in examples]),
        position_ids=positions,
    )
    visibility = None
    if examples[0].visibility is not None:
        visibility = _joined([_visibility(example) for example in examples])
    targets = _joined_targets(examples, starts)
    rows = _rows(targets, inputs.num_tokens)
    return PretrainingBatch(
        inputs,
        None if rows is None else torch.from_numpy(rows),
        {o: {k: torch.from_numpy(x) for k, x in t.items()} for o, t in targets.items()},
        visibility,
    )


def _joined_targets(examples: Sequence[Example], starts: Array) -> dict[str, dict[str, Array]]:
    if any(example.targets.keys() != examples[0].targets.keys() for example in examples):
        raise ValueError("examples: were prepared for different objectives")
    joined: dict[str, dict[str, Array]] = {}
    for objective, names in examples[0].targets.items():
        joined[objective] = {}
        for name in names:
            arrays = [example.targets[objective][name] for example in examples]
            array = np.concatenate(arrays)
            if name.endswith(("index", "place")):
                array = array + np.repeat(starts, [len(x) for x in arrays])
            if array.dtype.kind in "iu":
                array = array.astype(np.int64, copy=False)
            joined[objective][name] = array
    return joined


def _rows(targets: dict[str, dict[str, Array]], num_tokens: int) -> Array | None:
    """The tokens that any index names; they become rows of these. None if they are nearly all."""
    used = np.zeros(num_tokens, bool)
    indices = [(t, name) for t in targets.values() for name in t if name.endswith("index")]
    for target, name in indices:
        used[target[name]] = True
    rows = np.flatnonzero(used)
    if len(rows) > _MOST_ROWS * num_tokens:
        return None
    row_of = np.cumsum(used) - 1
    for target, name in indices:
        target[name] = row_of[target[name]]
    return rows


def _joined(arrays: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _positions(example: Example) -> Array:
    return np.arange(len(example)) if example.position_ids is None else example.position_ids


def _visibility(example: Example) -> Array:
    assert example.visibility is not None
    return example.visibility


class PaddedCollator:
    """Examples of ``mlm``, alone or with ``nsp`` or ``sop``, to the arguments of Hugging Face's
    BertForPreTraining and BertForMaskedLM: a ``data_collator`` for their Trainer.

    Give the Trainer ``remove_unused_columns=False``: an Example is no dict. Its Trainer tells a
    ``PretrainingData`` the epoch, so that masks differ from one to the next.

    pad_id: of [PAD].  multiple_of: what the width is rounded up to.
    """

    def __init__(self, pad_id: int = 0, multiple_of: int = 8) -> None:
        self.pad_id = pad_id
        self.multiple_of = multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids, labels (B, S), -100 where there is none, and
        next_sentence_label (B,) if there is an objective on pairs: 0 for B behind A."""
        objectives = set(examples[0].targets)
        pairs = objectives - {"mlm"}
        if "mlm" not in objectives or pairs not in ({"nsp"}, {"sop"}, set()):
            raise ValueError(
                f"examples: are for {'+'.join(examples[0].targets)}, expected mlm, mlm+nsp or "
                "mlm+sop"
            )
        width = max(len(example) for example in examples)
        shape = len(examples), -(-width // self.multiple_of) * self.multiple_of
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0,
                 "labels": IGNORED}  # fmt: skip
        arrays = {name: np.full(shape, fill) for name, fill in fills.items()}
        for row, example in enumerate(examples):
            here = row, slice(len(example))
            arrays["input_ids"][here] = example.ids
            arrays["attention_mask"][here] = 1
            arrays["token_type_ids"][here] = example.token_type_ids
            masked = example.targets["mlm"]
            arrays["labels"][row, masked["index"]] = masked["labels"]
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if pairs:
            relations = np.array([example.relation for example in examples])
            labels = np.where(relations == NONE, IGNORED, relations)
            batch["next_sentence_label"] = torch.from_numpy(labels)
        return batch
