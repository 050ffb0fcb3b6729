"""What a call may bring: padding anywhere, embeddings, positions, requests for more outputs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fastbert.hf import accelerate
from fastbert.hf.families import FAMILIES
from fastbert.ops import BackendError

from ._models import (
    COLUMNS,
    FAMILY_NAMES,
    VOCAB,
    batch_for,
    check_parity,
    lengths_mask,
    masked_lm,
    pair,
    tiny,
)

BACKBONES = tuple(family.backbone for family in FAMILIES.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_mask_of_any_dtype(dtype: torch.dtype) -> None:
    original, ours = pair("BertModel")
    batch = batch_for("BertModel")
    expected = original(**batch)
    output = ours(**{**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    mask = batch["attention_mask"] != 0
    torch.testing.assert_close(output[0][mask], expected[0][mask])


@pytest.mark.parametrize("name", BACKBONES)
def test_no_mask(name: str) -> None:
    original, ours = pair(name)
    batch = batch_for(name, lengths_mask((COLUMNS,) * 4))
    del batch["attention_mask"]
    check_parity(original, ours, batch)


@pytest.mark.parametrize("name", ["BertModel", "AlbertModel", "BertForSequenceClassification"])
def test_left_padding_pools_the_first_token(name: str) -> None:
    """As each row does alone; the original pools the padding in column 0."""
    original, ours = pair(name)
    batch = batch_for(name, lengths_mask(side="left"))
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {k: x[row : row + 1, -length:] for k, x in batch.items() if x.dim() > 1}
        columns = torch.arange(COLUMNS - length, COLUMNS)[None]
        expected = original(**alone, position_ids=columns)
        field = "logits" if "For" in name else "pooler_output"
        torch.testing.assert_close(ours(**batch)[field][row], expected[field][0])


def test_padding_leaves_as_zeros() -> None:
    _, ours = pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM")
    output = ours(**batch, output_hidden_states=True)
    padding = batch["attention_mask"] == 0
    for x in (output.logits, *output.hidden_states):
        assert not x[padding].any()


@pytest.mark.parametrize("name", [*BACKBONES, "BertForPreTraining", "AlbertForMaskedLM"])
def test_rows_without_any_token(name: str) -> None:
    _, ours = pair(name)
    mask = lengths_mask((0, 5, 0, 3))
    batch = batch_for(name, mask)
    output = ours(**batch)
    assert all(torch.isfinite(x).all() for x in output.values())
    output[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
    none = ours(**{k: x for k, x in batch_for(name, torch.zeros(2, 4)).items() if k != "labels"})
    assert all(torch.isfinite(x).all() for x in none.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_inputs_embeds(name: str) -> None:
    original, ours = pair(name)
    batch = batch_for(name)
    table = original.get_input_embeddings().weight
    batch["inputs_embeds"] = table[batch.pop("input_ids")].detach() * 1.1
    check_parity(original, ours, batch)


@pytest.mark.parametrize("name", [*BACKBONES, "BertForMaskedLM"])
def test_nan_in_padding_never_leaks(name: str) -> None:
    _, ours = pair(name)
    batch = batch_for(name)
    embeds = ours.get_input_embeddings().weight[batch.pop("input_ids")].detach()
    padding = batch["attention_mask"] == 0
    clean = ours(**batch, inputs_embeds=embeds)[0]
    poisoned = embeds.masked_fill(padding[..., None], float("nan")).requires_grad_()
    output = ours(**batch, inputs_embeds=poisoned)[0]
    assert torch.equal(output, clean)
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
    assert poisoned.grad is not None
    assert torch.isfinite(poisoned.grad[~padding]).all() and not poisoned.grad[padding].any()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("rows", [1, 4])
def test_position_ids(name: str, rows: int) -> None:
    original, ours = pair(name)
    batch = batch_for(name)
    positions = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:COLUMNS].sort()[0]
    batch["position_ids"] = (positions + 3).expand(rows, COLUMNS)
    check_parity(original, ours, batch)


def test_token_types_default_to_zero() -> None:
    _, ours = pair("BertModel")
    batch = batch_for("BertModel")
    batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    zeros = ours(**batch)[0]
    del batch["token_type_ids"]
    assert torch.equal(ours(**batch)[0], zeros)


def test_integers_of_32_bits() -> None:
    _, ours = pair("BertModel")
    batch = batch_for("BertModel")
    expected = ours(**batch)[0]
    assert torch.equal(ours(**{k: x.int() for k, x in batch.items()})[0], expected)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_roberta_positions_skip_pads_that_the_mask_keeps(family: str) -> None:
    name = FAMILIES[family].backbone
    original, ours = pair(name)
    batch = batch_for(name, lengths_mask((11,) * 4))
    batch["input_ids"][1, 3:6] = 1  # padding tokens in the middle, mask 1
    batch["input_ids"][2, :2] = 1
    check_parity(original, ours, batch)
    del batch["attention_mask"]
    check_parity(original, ours, batch)


@pytest.mark.parametrize("name", [*BACKBONES, "BertForTokenClassification", "AlbertForMaskedLM"])
def test_hidden_states(name: str) -> None:
    original, ours = pair(name)
    batch = batch_for(name)
    expected = original(**batch, output_hidden_states=True)
    output = ours(**batch, output_hidden_states=True)
    assert list(output) == list(expected)
    assert len(output.hidden_states) == len(expected.hidden_states)
    mask = batch["attention_mask"] != 0
    for x, y in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-4, atol=1e-5)
    if "For" not in name:
        assert output.hidden_states[-1] is output.last_hidden_state


@pytest.mark.parametrize("name", [*BACKBONES, "BertForTokenClassification"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_attentions(name: str, side: str) -> None:
    original, ours = pair(name)
    original.set_attn_implementation("eager")
    batch = batch_for(name, lengths_mask(side=side))
    expected = original(**batch, output_attentions=True)
    output = ours(**batch, output_attentions=True)
    assert list(output) == list(expected)
    assert len(output.attentions) == len(expected.attentions)
    mask = batch["attention_mask"] != 0
    both = mask[:, None, :, None] & mask[:, None, None, :]
    for x, y in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(x, y.where(both, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "ElectraModel", "BertForPreTraining"])
def test_tuples_in_place_of_a_dict(name: str) -> None:
    original, ours = pair(name)
    batch = batch_for(name)
    extras = {"output_hidden_states": True, "return_dict": False}
    expected, output = original(**batch, **extras), ours(**batch, **extras)
    assert isinstance(output, tuple) and len(output) == len(expected)
    assert [type(x) for x in output] == [type(x) for x in expected]
    ours.config.return_dict = False
    assert isinstance(ours(**batch), tuple)
    assert type(ours(**batch, return_dict=True)) is type(original(**batch))


def test_config_asks_for_outputs() -> None:
    original, ours = pair("BertForMaskedLM", output_hidden_states=True)
    batch = batch_for("BertForMaskedLM")
    assert list(ours(**batch)) == list(original(**batch))
    assert "hidden_states" not in ours(**batch, output_hidden_states=False)


def test_positional_arguments() -> None:
    original, ours = pair("BertForSequenceClassification")
    batch = batch_for("BertForSequenceClassification")
    order = ("input_ids", "attention_mask", "token_type_ids")
    args = [batch[name] for name in order]
    torch.testing.assert_close(ours(*args).logits, original(*args).logits)
    with pytest.raises(TypeError, match="multiple values"):
        ours(*args, input_ids=args[0])
    with pytest.raises(TypeError, match="positional"):
        ours(*args, *[None] * 10)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"encoder_hidden_states": torch.zeros(4, 2, 48)}, "encoder_hidden_states"),
        ({"attention_mask": torch.ones(4, 1, COLUMNS, COLUMNS).bool()}, r"not \(B, S\)"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_falls_back_and_says_so_once(
    extra: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    original, ours = pair("BertModel")
    batch = {**batch_for("BertModel"), **extra}
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        for _ in range(2):
            assert torch.equal(ours(**batch)[0], original(**batch)[0])
    [(text, count)] = ours._fastbert.fallbacks.items()
    assert count == 2 and (reason in text or text in reason or "not (B, S)" in text)
    assert sum("BertModel" in record.getMessage() for record in caplog.records) <= 1
    accelerate(ours, strict=True)
    with pytest.raises(BackendError, match=reason):
        ours(**batch)


def test_a_decoder_is_not_accelerated() -> None:
    model = tiny("BertModel")
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="is a decoder"):
        accelerate(model)
    _, ours = pair("BertModel")
    ours.config.is_decoder = True
    assert ours(**batch_for("BertModel"))[0].shape == (4, COLUMNS, 48)
    assert "decoder" in next(iter(ours._fastbert.fallbacks))


def test_ignored_arguments_are_no_reason() -> None:
    _, ours = pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM")
    expected = ours(**batch)
    output = ours(**batch, use_cache=True, num_items_in_batch=7, encoder_hidden_states=None)
    assert torch.equal(output.loss, expected.loss)
    assert not ours._fastbert.fallbacks and not ours.bert._fastbert.fallbacks


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bad_input_names_the_argument(family: str) -> None:
    ours = pair(masked_lm(family))[1]
    ids = torch.full((2, 5), 7)
    with pytest.raises(ValueError, match="input_ids"):
        ours()
    with pytest.raises(ValueError, match="input_ids"):
        ours(input_ids=ids, inputs_embeds=torch.zeros(2, 5, 48))
    with pytest.raises(ValueError, match="attention_mask"):
        ours(input_ids=ids, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="position"):
        ours(input_ids=torch.full((1, 60), 7))
    with pytest.raises(ValueError, match="input_ids|word"):
        ours(input_ids=torch.full((1, 5), VOCAB))
    with pytest.raises(ValueError, match="input_ids|word"):
        ours(input_ids=torch.full((1, 5), -1))
    with pytest.raises(ValueError, match="input_ids"):
        ours(input_ids=ids[0])
    with pytest.raises(ValueError, match="labels"):
        ours(input_ids=ids, labels=torch.zeros(2, 4, dtype=torch.int64))


def test_empty_batches() -> None:
    _, ours = pair("BertModel")
    assert ours(input_ids=torch.zeros(0, 5, dtype=torch.int64))[0].shape == (0, 5, 48)
    assert ours(input_ids=torch.zeros(2, 0, dtype=torch.int64))[0].shape == (2, 0, 48)
