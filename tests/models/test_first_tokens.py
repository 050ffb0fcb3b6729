"""Heads on the pooler: the last layer computed for each sequence's first token alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastbert
from fastbert import PackedBatch

SEQUENCE_HEADS = (
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
)
LENGTHS = (5, 0, 1, 9, 12, 2)


def model_of(head, config):
    model = getattr(fastbert, head)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch_and_labels(head):
    batch = PackedBatch.from_sequences([torch.randint(1, 97, (n,)).tolist() for n in LENGTHS])
    if head == "BertForMultipleChoice":
        return {"batch": batch, "labels": torch.randint(0, 2, (3,)), "num_choices": 2}
    return {"batch": batch, "labels": torch.randint(0, 2, (6,))}


@pytest.mark.parametrize("head", SEQUENCE_HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_same_numbers_as_the_whole(head, training, tiny_config):
    """Logits, loss and every gradient; in training with dropout at 0."""
    model = model_of(head, tiny_config()).train(training)
    inputs, found = batch_and_labels(head), []
    for whole in (False, True):
        model.zero_grad()
        output = model(**inputs, output_hidden_states=whole)
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        found.append([output.logits, output.loss, *gradients])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", SEQUENCE_HEADS)
def test_only_first_tokens_go_on(head, tiny_config):
    """Behind the last attention five rows, of the sequences that have a token, not 29; and all 29
    where hidden states or attentions are asked for, of which the outputs have the whole."""
    model = model_of(head, tiny_config())
    rows = []
    last = model.bert.encoder.layer[-1].output.dense
    last.register_forward_hook(lambda _, args, y: rows.append(len(args[0])))
    inputs = batch_and_labels(head)
    del inputs["labels"]
    model(**inputs)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    attentions = model(**inputs, output_attentions=True).attentions
    assert rows == [5, 29, 29]
    assert hidden[-1].shape == (29, 32) and attentions[-1].shape == (6, 2, 12, 12)


def test_bert_model_alone_computes_all_of_it(tiny_config):
    model = model_of("BertModel", tiny_config()).eval()
    batch = batch_and_labels("BertModel")["batch"]
    whole, firsts = model(batch=batch), model(batch=batch, first_tokens=True)
    assert whole.last_hidden_state.shape == (29, 32)
    expected = whole.last_hidden_state[torch.tensor([0, 5, 6, 15, 27])]
    torch.testing.assert_close(firsts.last_hidden_state, expected)
    torch.testing.assert_close(firsts.pooler_output, whole.pooler_output)


@pytest.mark.parametrize("again", [False, True])
def test_dropout_is_that_of_the_rows(again, tiny_config):
    """With dropout everywhere but behind the last attention, where it falls otherwise, nothing
    changes; with gradient checkpointing a layer computed again drops the same."""
    model = model_of(
        SEQUENCE_HEADS[1],
        tiny_config(
            hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, classifier_dropout=0.0
        ),
    )
    if again:
        model.bert.gradient_checkpointing_enable()
    last = model.bert.encoder.layer[-1]
    last.attention.output.dropout = last.output.dropout = nn.Dropout(0.0)
    inputs, found = batch_and_labels(SEQUENCE_HEADS[1]), []
    for whole in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        output = model.train()(**inputs, output_hidden_states=whole)
        output.loss.backward()
        found.append([output.logits, *(p.grad.clone() for p in model.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_torch_compile(tiny_config):
    """One graph, with dropout or without."""
    model = model_of(SEQUENCE_HEADS[1], tiny_config(hidden_dropout_prob=0.2))
    lengths = (5, 1, 9, 12)
    ids = torch.randint(1, 97, (27,))
    inputs = {"batch": PackedBatch.from_flat(ids, lengths), "labels": torch.randint(0, 2, (4,))}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled.eval()(**inputs).loss, model.eval()(**inputs).loss)
    losses = []
    for each in (model.train(), compiled.train()):
        model.zero_grad()
        torch.manual_seed(1)
        loss = each(**inputs).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, other in zip(*losses, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
