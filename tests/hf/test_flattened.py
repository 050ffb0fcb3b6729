"""Flattened batches: block-diagonal attention, and every head right for each sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from fastbert.hf.families import FAMILIES

from ._models import (
    MODEL_NAMES,
    batch_for,
    family_of_class,
    lengths_mask,
    pair,
    run,
)

LENGTHS = (11, 1, 7, 4)
_TOKEN_FIELDS = ("last_hidden_state", "prediction_logits", "start_logits", "end_logits")


def flattened(name: str, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tokens of a padded batch end to end, positions restarting, and labels to match."""
    mask = batch["attention_mask"] != 0
    if name.endswith("MultipleChoice"):
        mask = mask.view(-1, mask.shape[-1])
    flat: dict[str, Any] = {}
    for key, x in batch.items():
        per_token = x.numel() == mask.numel()
        flat[key] = x.reshape(mask.shape)[mask][None] if per_token else x
    del flat["attention_mask"]
    flat["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return flat


@pytest.mark.parametrize("offsets", [False, True], ids=["restarts", "cu_seq_lens"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_same_as_padded(name: str, offsets: bool) -> None:
    _, ours = pair(name)
    batch = batch_for(name, lengths_mask(LENGTHS))
    flat = flattened(name, batch)
    if offsets:
        del flat["position_ids"]
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        flat.update(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=11, max_length_k=11)
    padded = run(ours, batch)
    packed = run(ours, flat)
    for field, x in packed.outputs.items():
        y = padded.outputs[field]
        torch.testing.assert_close(x.reshape(y.shape), y, rtol=1e-5, atol=1e-6, msg=field)
    if padded.loss is not None:
        torch.testing.assert_close(packed.loss, padded.loss)
        for key, gradient in packed.gradients.items():
            torch.testing.assert_close(gradient, padded.gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["encoder.layer.1.output", "embeddings"])
def test_same_as_padded_around_a_hook(path: str) -> None:
    """What is not fused keeps the sequences apart too."""
    _, ours = pair("BertModel")
    ours.get_submodule(path).register_forward_hook(lambda m, args, y: y * 1.1)
    batch = batch_for("BertModel", lengths_mask(LENGTHS))
    padded, packed = run(ours, batch), run(ours, flattened("BertModel", batch))
    for field, x in packed.outputs.items():
        y = padded.outputs[field]
        torch.testing.assert_close(x.reshape(y.shape), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertModel"])
def test_token_outputs_keep_the_row(name: str) -> None:
    _, ours = pair(name)
    flat = flattened(name, batch_for(name, lengths_mask(LENGTHS)))
    output = ours(**flat, output_hidden_states=True)
    total = sum(LENGTHS)
    assert output.hidden_states[1].shape == (1, total, 48)
    if name == "BertModel":
        assert output.last_hidden_state.shape == (1, total, 48)
        assert output.pooler_output.shape == (4, 48)
    else:
        assert output.logits.shape == (1, total, 3)


def test_attentions_are_block_diagonal() -> None:
    _, ours = pair("BertModel")
    flat = flattened("BertModel", batch_for("BertModel", lengths_mask(LENGTHS)))
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    same = sequence[:, None] == sequence[None]
    for p in ours(**flat, output_attentions=True).attentions:
        assert p.shape == (1, 4, len(sequence), len(sequence))
        assert not p[..., ~same].any()
        torch.testing.assert_close(p.sum(-1), torch.ones(1, 4, len(sequence)))


@pytest.mark.parametrize("kwargs", [False, True])
def test_collator_of_transformers(kwargs: bool) -> None:
    original, ours = pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM", lengths_mask(LENGTHS))
    rows = [row[:n].tolist() for row, n in zip(batch["input_ids"], LENGTHS, strict=True)]
    labels = [row[:n].tolist() for row, n in zip(batch["labels"], LENGTHS, strict=True)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=kwargs, return_seq_idx=kwargs)
    flat = collator([{"input_ids": i, "labels": t} for i, t in zip(rows, labels, strict=True)])
    logits = ours(**flat).logits[0]
    start = 0
    for row in rows:
        alone = original(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[start : start + len(row)], alone, rtol=1e-4, atol=1e-5)
        start += len(row)


@pytest.mark.parametrize("start", [0, 2])
def test_roberta_positions_start_after_padding(start: int) -> None:
    """DataCollatorWithFlattening counts from 0 unless told otherwise; RoBERTa's table from 2."""
    original, ours = pair("RobertaModel")
    rows = [torch.randint(2, 90, (n,)) for n in (5, 3)]
    positions = torch.cat([torch.arange(len(r)) + start for r in rows])[None]
    output = ours(torch.cat(rows)[None], position_ids=positions)[0][0]
    expected = torch.cat([original(row[None])[0][0] for row in rows])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_no_restart_is_one_sequence() -> None:
    original, ours = pair("BertModel")
    ids, positions = torch.randint(2, 90, (1, 8)), torch.arange(8)[None]
    output = ours(ids, position_ids=positions)
    torch.testing.assert_close(output[0], original(ids, position_ids=positions)[0])
    assert output.pooler_output.shape == (1, 48)


def test_restarts_in_a_padded_batch_are_positions_only() -> None:
    original, ours = pair("BertModel")
    ids = torch.randint(2, 90, (2, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    torch.testing.assert_close(
        ours(ids, position_ids=positions)[0], original(ids, position_ids=positions)[0]
    )


@pytest.mark.parametrize("positions", [[0] * 6, [3, 1, 2, 0, 5, 4], [0, 1, 2, 2, 3, 4]])
def test_positions_of_one_sequence(positions: list[int]) -> None:
    """Positions that repeat or jump otherwise than back to the first are one sequence's own."""
    original, ours = pair("BertModel")
    call = {"input_ids": torch.randint(2, 90, (1, 6)), "position_ids": torch.tensor([positions])}
    torch.testing.assert_close(ours(**call)[0], original(**call)[0])


def test_neighbours_do_not_matter() -> None:
    _, ours = pair("BertModel")
    a, b, c = (torch.randint(2, 90, (n,)) for n in (4, 6, 6))
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with_b = ours(torch.cat([a, b])[None], position_ids=positions)[0][0, :4]
    with_c = ours(torch.cat([a, c])[None], position_ids=positions)[0][0, :4]
    assert torch.equal(with_b, with_c)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([1, 6])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])}, "cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
            "cu_seq_lens_k",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 6]), "attention_mask": torch.ones(1, 6)},
            "attention_mask",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "input_ids": torch.ones(2, 6).long()}, "row"),
    ],
)
def test_bad_offsets(changes: dict[str, Any], match: str) -> None:
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match=match):
        ours(**{"input_ids": torch.full((1, 6), 5), **changes})


def test_every_family_is_here() -> None:
    assert {family_of_class(name) for name in MODEL_NAMES} == set(FAMILIES)
