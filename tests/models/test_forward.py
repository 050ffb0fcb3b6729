"""What native models do with batches that transformers does not take, or takes differently."""

from __future__ import annotations

import copy

import pytest
import torch

import fastbert
from fastbert import PackedBatch
from fastbert.models.outputs import ModelOutput


@pytest.fixture
def model(head, tiny_config):
    return getattr(fastbert, head)(tiny_config()).eval()


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def choices(head):
    return {"num_choices": 2} if head == "BertForMultipleChoice" else {}


def with_logits(head):
    return {"return_logits": True} if head in ("BertForMaskedLM", "BertForPreTraining") else {}


def packed_twin(head, padded):
    """The same inputs and labels, packed."""
    rows = {
        name: x.flatten(0, 1) if head == "BertForMultipleChoice" and name != "labels" else x
        for name, x in padded.items()
    }
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = PackedBatch.from_padded(**{name: rows.pop(name) for name in names})
    if "labels" in rows and rows["labels"].shape == batch.padded_shape:
        rows["labels"] = batch.pack(rows["labels"])
    return batch, rows


def test_packed_and_padded_agree_bit_for_bit(head, model, inputs):
    padded = inputs(head)
    batch, labels = packed_twin(head, padded)
    more = {"output_hidden_states": True, "output_attentions": True, **with_logits(head)}
    out = model(**padded, **more)
    twin = model(batch=batch, **labels, **more, **choices(head))
    assert out.keys() == twin.keys()
    mask = padded["attention_mask"].flatten(0, -2).bool()
    for (name, value), other in zip(out.items(), twin, strict=True):
        for x, y in zip(as_tuple(value), as_tuple(other), strict=True):
            if x.shape[:2] == mask.shape:
                assert y.shape[0] == batch.num_tokens
                x = x[mask]
            assert torch.equal(x, y), name


def test_padding_comes_back_as_zeros_or_as_the_lowest_logit(head, model, inputs):
    padded = inputs(head)
    out = model(**padded, **with_logits(head))
    gaps = padded["attention_mask"] == 0
    for name, x in out.items():
        if x.shape[:2] == gaps.shape:
            lowest = torch.finfo(x.dtype).min if name in ("start_logits", "end_logits") else 0.0
            assert (x[gaps] == lowest).all()


def test_neighbours_never_matter(head, model):
    lengths = (5, 9, 3, 6)
    ids = [torch.randint(1, 97, (n,)).tolist() for n in lengths]
    other = [*ids[:1], torch.randint(1, 97, (9,)).tolist(), *ids[2:]]
    outs = [model(batch=PackedBatch.from_sequences(s), **choices(head)) for s in (ids, other)]
    keep_tokens = torch.ones(sum(lengths), dtype=torch.bool)
    keep_tokens[5:14] = False
    for x, y in zip(*outs, strict=True):
        if x.shape[0] == sum(lengths):
            x, y = x[keep_tokens], y[keep_tokens]
        elif head == "BertForMultipleChoice":
            x, y = x.flatten()[[0, 2, 3]], y.flatten()[[0, 2, 3]]
        else:
            x, y = x[[0, 2, 3]], y[[0, 2, 3]]
        assert torch.equal(x, y)


def test_a_sequence_alone_gives_what_it_gives_in_a_batch(tiny_config):
    model = fastbert.BertModel(tiny_config()).double().eval()
    ids = [torch.randint(1, 97, (n,)).tolist() for n in (5, 9, 1, 6)]
    together = model(batch=PackedBatch.from_sequences(ids)).last_hidden_state
    alone = [model(batch=PackedBatch.from_sequences([s])).last_hidden_state for s in ids]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_nan_in_padding_never_leaks(head, model, inputs):
    padded = inputs(head)
    embeds = model.get_parameter(
        next(n for n, _ in model.named_parameters() if n.endswith("word_embeddings.weight"))
    )[padded.pop("input_ids")].detach()
    clean, dirty = embeds.clone().requires_grad_(), embeds.clone()
    dirty[padded["attention_mask"] == 0] = float("nan")
    dirty.requires_grad_()
    outs = [model(inputs_embeds=x, **padded, **with_logits(head)) for x in (clean, dirty)]
    for x, y in zip(*outs, strict=True):
        assert torch.equal(x, y)
    for out in outs:
        out[0].sum().backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 4, 0, 3), (0, 1)])
def test_empty_sequences_and_no_tokens(head, model, lengths):
    lengths = (0, *lengths) if head == "BertForMultipleChoice" and len(lengths) % 2 else lengths
    batch = PackedBatch.from_sequences([[7] * n for n in lengths])
    more = {"output_hidden_states": True, "output_attentions": True}
    out = model(batch=batch, **more, **choices(head))
    for name, value in out.items():
        for x in as_tuple(value):
            assert x.isfinite().all(), name
    assert all(h.shape == (sum(lengths), 32) for h in out.hidden_states)
    model.train()
    loss = sum(x.sum() for x in model(batch=batch, **choices(head)))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


def test_padded_batches_without_tokens(tiny_config):
    model = fastbert.BertModel(tiny_config()).eval()
    ids = torch.ones(2, 3, dtype=torch.long)
    out = model(ids, torch.zeros(2, 3))
    assert out.last_hidden_state.shape == (2, 3, 32) and (out.last_hidden_state == 0).all()
    assert torch.equal(out.pooler_output[0], torch.tanh(model.pooler.dense.bias))
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert model(torch.ones(shape, dtype=torch.long))[0].shape == (*shape, 32)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_loss_over_nothing_is_nan_with_zero_gradients(head, model):
    """As in torch: the mean of no number."""
    batch = PackedBatch.from_sequences([[3, 4], []])
    loss = model(batch=batch, labels=torch.full((2,), -100)).loss
    loss.backward()
    assert loss.isnan()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all((grad == 0).all() for grad in grads)


def test_masked_lm_returns_logits_only_where_asked(tiny_config):
    model = fastbert.BertForMaskedLM(tiny_config()).eval()
    ids = torch.randint(1, 97, (2, 6))
    labels = torch.full_like(ids, -100)
    labels[0, 2] = 9
    assert model(ids).logits.shape == (2, 6, 97)
    assert model(ids, labels=labels).logits is None
    assert model(ids, return_logits=False).logits is None
    out = model(ids, labels=labels, return_logits=True)
    expected = torch.nn.functional.cross_entropy(out.logits[0, 2:3], torch.tensor([9]))
    torch.testing.assert_close(out.loss, expected)


def test_pretraining_takes_either_label(tiny_config, inputs):
    model = fastbert.BertForPreTraining(tiny_config()).eval()
    both = inputs("BertForPreTraining")
    labels, following = both.pop("labels"), both.pop("next_sentence_label")
    lm = model(**both, labels=labels).loss
    nsp = model(**both, next_sentence_label=following).loss
    total = model(**both, labels=labels, next_sentence_label=following).loss
    torch.testing.assert_close(lm + nsp, total)
    assert model(**both).loss is None


def test_span_loss_over_real_tokens(tiny_config, hf_model, native):
    """transformers, one unpadded row at a time, is what a padded batch here should give."""
    hf = hf_model("BertForQuestionAnswering").double()
    ours = native(hf)
    lengths = (5, 9, 3)
    ids = [torch.randint(1, 97, (n,)) for n in lengths]
    start, end = torch.tensor([1, 30, 2]), torch.tensor([-4, 8, 1])  # 30: beyond; -4: clamped to 0
    rows = [hf(i[None], start_positions=s[None], end_positions=e[None]) for i, s, e in
            zip(ids, start, end, strict=True)]  # fmt: skip
    starts = [-torch.log_softmax(r.start_logits[0], 0)[s] for r, s in zip(rows, start, strict=True)
              if s < r.start_logits.shape[1]]  # fmt: skip
    ends = [-torch.log_softmax(r.end_logits[0], 0)[max(e, 0)] for r, e in
            zip(rows, end, strict=True)]  # fmt: skip
    expected = (torch.stack(starts).mean() + torch.stack(ends).mean()) / 2
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = {"start_positions": start, "end_positions": end}
    out = ours(padded, (padded > 0).long(), **labels)
    torch.testing.assert_close(out.loss, expected)
    packed = ours(batch=PackedBatch.from_sequences([i.tolist() for i in ids]), **labels)
    torch.testing.assert_close(packed.loss, expected)
    assert packed.start_logits.shape == (17,)
    # The answer is never found in padding.
    assert (out.start_logits.argmax(1) < torch.tensor(lengths)).all()


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (torch.tensor([0.3, -1.0, 2.0]), {"num_labels": 1}),
        (torch.tensor([[0.3], [-1.0], [2.0]]), {"num_labels": 1}),
        (torch.randn(3, 4), {"num_labels": 4, "problem_type": "regression"}),
        (torch.tensor([3, 0, 1]), {"num_labels": 4}),
        (torch.tensor([3, -100, 1]), {"num_labels": 4}),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), {"num_labels": 2}),
    ],
)
def test_problem_types(labels, changes, hf_model, native):
    hf = hf_model("BertForSequenceClassification", **changes)
    ours = native(hf)
    ids = torch.randint(1, 97, (3, 6))
    torch.testing.assert_close(ours(ids, labels=labels).loss, hf(ids, labels=labels).loss)
    assert ours.config.problem_type == changes.get("problem_type")  # not written to, as theirs is


def test_checkpointing_changes_nothing_but_memory(head, tiny_config, inputs):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = getattr(fastbert, head)(tiny_config(**dropout)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    results = []
    for m in (model, twin):
        torch.manual_seed(3)
        out = m(**inputs(head))
        out[0].sum().backward()
        results.append((out[0], {n: p.grad for n, p in m.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]) if grad is not None else True, name
    twin.gradient_checkpointing_disable()
    assert not twin.get_submodule(
        "encoder" if head == "BertModel" else "bert.encoder"
    ).gradient_checkpointing


def test_checkpointing_computes_layers_again(tiny_config):
    model = fastbert.BertModel(tiny_config()).train()
    model.gradient_checkpointing_enable()
    calls = []
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    out = model(torch.ones(1, 4, dtype=torch.long))
    assert len(calls) == 2
    out[0].sum().backward()
    assert len(calls) == 4


def test_dropout_follows_torchs_seed_and_the_mode(tiny_config):
    model = fastbert.BertModel(tiny_config(hidden_dropout_prob=0.3))
    ids = torch.randint(1, 97, (2, 6))

    def run(seed):
        torch.manual_seed(seed)
        return model(ids)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_hooks_on_layers_and_submodels_fire(tiny_config):
    model = fastbert.BertForMaskedLM(tiny_config()).eval()
    seen = []
    for name in (
        "bert",
        "bert.embeddings",
        "bert.encoder",
        "bert.encoder.layer.1",
        "cls.predictions",
    ):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.ones(1, 3, dtype=torch.long))
    assert seen == [
        "bert.embeddings",
        "bert.encoder.layer.1",
        "bert.encoder",
        "bert",
        "cls.predictions",
    ]


def test_torch_compile(tiny_config):
    model = fastbert.BertForSequenceClassification(tiny_config())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = PackedBatch.from_sequences([[1, 2, 3], [4], [5, 6]])
    labels = torch.tensor([0, 1, 1])
    grads = []
    for m in (model.eval(), compiled):
        model.zero_grad()
        out = m(batch=batch, labels=labels)
        out.loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_one_compiled_model_serves_other_lengths(tiny_config):
    """Dynamo then compiles anew, with lengths that it no longer takes for constants."""
    torch.compiler.reset()
    model = fastbert.BertForSequenceClassification(tiny_config()).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 1, 2], [2, 2, 4], [1, 6, 5], [1], [2, 3]):
        batch = PackedBatch.from_sequences([[5] * n for n in lengths])
        torch.testing.assert_close(compiled(batch=batch).logits, model(batch=batch).logits)
    torch.compiler.reset()


def test_outputs_read_as_tuples_and_dicts(tiny_config):
    model = fastbert.BertForSequenceClassification(tiny_config()).eval()
    out = model(torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1]))
    assert isinstance(out, ModelOutput) and len(out) == 2
    loss, logits = out
    assert loss is out.loss is out[0] is out["loss"] and logits is out[-1]
    assert out[:1] == (loss,) and out.to_tuple() == (loss, logits)
    assert "loss" in out and "attentions" not in out and out.keys() == ("loss", "logits")
    with pytest.raises(KeyError):
        out["attentions"]


def test_initialisation(tiny_config):
    config = tiny_config(initializer_range=0.02, vocab_size=2000)
    model = fastbert.BertForPreTraining(config)
    word = model.bert.embeddings.word_embeddings.weight
    assert (word[0] == 0).all() and word.requires_grad
    assert word.abs().max() <= 0.04
    # A normal cut at two standard deviations has 0.8796 of its deviation left.
    assert word[1:].std().item() == pytest.approx(0.8796 * 0.02, rel=0.02)
    assert model.cls.predictions.decoder.weight is word
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    for name, p in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert p.std() > 0.01 and not p.is_meta, name


def test_copies_keep_the_tie(tiny_config):
    model = copy.deepcopy(fastbert.BertForMaskedLM(tiny_config())).double()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_untied_decoder(hf_model, native):
    hf = hf_model("BertForMaskedLM", tie_word_embeddings=False)
    ours = native(hf)
    ids = torch.randint(1, 97, (2, 5))
    torch.testing.assert_close(ours(ids).logits, hf(ids).logits)
    assert ours.cls.predictions.decoder.weight is not ours.bert.embeddings.word_embeddings.weight
