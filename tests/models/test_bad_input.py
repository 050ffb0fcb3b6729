"""Wrong inputs: a ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import pytest
import torch

import fastbert
from fastbert import PackedBatch

IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.fixture
def model(tiny_config):
    return fastbert.BertModel(tiny_config()).eval()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 32)}, "exactly one"),
        ({"input_ids": IDS[0]}, r"input_ids: got shape \(5,\), expected \(B, S\)"),
        ({"inputs_embeds": torch.ones(2, 32)}, r"inputs_embeds: got shape \(2, 32\)"),
        ({"inputs_embeds": torch.ones(2, 5, 31)}, "31"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"attention_mask: got .*\(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5, 5)}, "attention_mask: got"),
        ({"input_ids": IDS, "token_type_ids": IDS[:1]}, r"token_type_ids: got .*\(1, 5\)"),
        ({"input_ids": IDS, "position_ids": IDS[:, :4]}, r"position_ids: got .*\(2, 4\)"),
        ({"input_ids": IDS.float()}, "input_ids: got float32"),
        ({"input_ids": IDS.int()}, "input_ids: got int32.*expected int64"),
        ({"input_ids": IDS * 97}, r"input_ids: got 97, expected 0 \.\. 96"),
        ({"input_ids": IDS - 2}, r"input_ids: got -1, expected 0 \.\. 96"),
        (
            {"input_ids": IDS, "token_type_ids": IDS * 2},
            r"token_type_ids: got 2, expected 0 \.\. 1",
        ),
        ({"input_ids": IDS, "position_ids": IDS * 24}, r"position_ids: got 24, expected 0 \.\. 23"),
        ({"input_ids": torch.ones(1, 25, dtype=torch.long)}, "25 tokens, expected at most 24"),
        ({"batch": PackedBatch.from_sequences([[97]])}, "input_ids: got 97"),
        ({"batch": PackedBatch.from_sequences([[1] * 25])}, "25 tokens, expected at most 24"),
        (
            {"batch": PackedBatch.from_sequences([[1]]), "input_ids": IDS},
            "batch: got input_ids too",
        ),
        ({"batch": IDS}, "batch: got Tensor, expected a PackedBatch"),
    ],
)
def test_inputs(inputs, message, model):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (
            "BertForMaskedLM",
            {"labels": IDS[:, :4]},
            r"labels: got shape \(2, 4\), expected \(2, 5\)",
        ),
        ("BertForMaskedLM", {"labels": IDS * 97}, r"labels: got 97, expected 0 \.\. 96, or -100"),
        ("BertForMaskedLM", {"labels": IDS.float()}, "labels: got float32"),
        (
            "BertForPreTraining",
            {"next_sentence_label": IDS[0, :2] * 2},
            "next_sentence_label: got 2",
        ),
        ("BertForNextSentencePrediction", {"labels": IDS[0, :3]}, "expected 2 whole numbers"),
        ("BertForTokenClassification", {"labels": IDS * 2}, r"labels: got 2, expected 0 \.\. 1"),
        ("BertForSequenceClassification", {"labels": IDS[0, :2] * -1}, "labels: got -1"),
        ("BertForSequenceClassification", {"labels": torch.ones(2)}, "multi_label_classification"),
        (
            "BertForSequenceClassification",
            {"labels": IDS[0, :2].to("meta")},
            "on meta, expected 2 whole numbers on cpu",
        ),
        (
            "BertForQuestionAnswering",
            {"start_positions": IDS[0, :2]},
            "together with end_positions",
        ),
        (
            "BertForQuestionAnswering",
            {"start_positions": IDS[0, :2], "end_positions": IDS[0, :3]},
            "start_positions, end_positions: got",
        ),
    ],
)
def test_labels(head, labels, message, tiny_config):
    model = getattr(fastbert, head)(tiny_config())
    with pytest.raises(ValueError, match=message):
        model(IDS, **labels)


def test_packed_labels(tiny_config):
    model = fastbert.BertForTokenClassification(tiny_config())
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 5\), expected \(10,\)"):
        model(batch=PackedBatch.from_padded(IDS), labels=IDS)


def test_choices(tiny_config):
    model = fastbert.BertForMultipleChoice(tiny_config())
    with pytest.raises(ValueError, match=r"input_ids: got shape \(2, 5\), expected \(B, choices"):
        model(IDS)
    batch = PackedBatch.from_sequences([[1], [2], [3]])
    for wrong in ({}, {"num_choices": 2}):
        with pytest.raises(ValueError, match="num_choices: got .* divisor of the 3 sequences"):
            model(batch=batch, **wrong)


def test_spans_have_two_ends(tiny_config):
    with pytest.raises(ValueError, match="num_labels: got 3, expected 2"):
        fastbert.BertForQuestionAnswering(tiny_config(num_labels=3))


def test_wrong_device(model):
    with pytest.raises(ValueError, match="meta"):
        model(IDS.to("meta"))


def test_forced_backend_that_is_not_there(model):
    with pytest.raises(ValueError, match="cannot"), fastbert.use_backend("cuda"):
        model(IDS)
    with pytest.raises(ValueError, match="unknown name 'mkl'"):
        fastbert.use_backend("mkl")
