"""Each summand of the loss against its equation, written out with plain torch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastbert.pretrain import Masking, PretrainingBatch, PretrainingModel, collate, parse
from fastbert.pretrain.encode import encode
from fastbert.pretrain.objectives.objective import class_term, token_term
from fastbert.pretrain.objectives.replaced import generator_config, sample_tokens

from ._models import CONFIG, V, batch_of, model_of, prepared_by, texts

Tensor = torch.Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

NOISE = {"bart": {"delete": 0.3, "insert": 0.2, "rotate": 0.7}}
ALL = [
    "mlm", "mlm+nsp", "mlm+sop", "mlm+sbo", "word-order", "capitalised+elsewhere", "reorder",
    "plm", "unilm2", "bart", "rtd",
]  # fmt: skip


def made(text: str) -> tuple[PretrainingModel, PretrainingBatch]:
    objectives = parse(text, Masking(rate=0.3, what="span") if "sbo" in text else None,
                       NOISE if text == "bart" else None)  # fmt: skip
    return model_of(objectives), batch_of(objectives, texts(20, 31, 8, 12))


def states_of(model: PretrainingModel, batch: PretrainingBatch) -> Tensor:
    """(T, H), without the shortcut for rows."""
    return encode(model.bert, batch.replace(rows=None))


def norm(x: Tensor, module: Any) -> Tensor:
    return F.layer_norm(x, (x.shape[1],), module.weight, module.bias, CONFIG.layer_norm_eps)


def masked_lm(model: PretrainingModel, x: Tensor) -> Tensor:
    """Logits of BERT's head."""
    head: Any = model.heads["lm"]
    h = norm(F.gelu(head.transform.dense(x)), head.transform.LayerNorm)
    return h @ model.bert.embeddings.word_embeddings.weight.T + head.bias


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text, name, index", [
    ("mlm", "mlm", "index"),
    ("word-order", "word-order", "index"),
    ("plm", "plm", "index"),
    ("unilm2", "unilm2/ae", "index"),
    ("unilm2", "unilm2/par", "pseudo_index"),
])  # fmt: skip
def test_tokens_from_their_states(text: str, name: str, index: str) -> None:
    model, batch = made(text)
    targets = batch.targets[text]
    logits = masked_lm(model, states_of(model, batch)[batch.places(targets[index])])
    output = model(batch, measure=True)
    close(output.terms[name].total, F.cross_entropy(logits, targets["labels"], reduction="sum"))
    right, most = (logits.argmax(1) == targets["labels"]).sum(), targets["labels"].bincount().max()
    assert (output.terms[name].correct, output.terms[name].chance) == (right, most)
    count = len(targets["labels"])
    assert output.accuracies()[name] == (right.float() / count, most.float() / count)


def test_span_boundary() -> None:
    """h = LN(GELU(W_1 [x_{s-1}; x_{e+1}; p])), y = LN(GELU(W_2 h)), E y + b."""
    model, batch = made("mlm+sbo")
    targets, head, x = batch.targets["sbo"], model.heads["sbo"], states_of(model, batch)
    assert len(targets["labels"]) > 10 and targets["offset"].max() > 1
    sides = [x[batch.places(targets[f"{side}_index"])] for side in ("left", "right")]
    h = torch.cat((*sides, head.offsets.weight[targets["offset"]]), 1)
    assert h.shape[1] == 2 * CONFIG.hidden_size + 200
    h = norm(F.gelu(h @ head.first.weight.T + head.first.bias), head.first_norm)
    y = norm(F.gelu(h @ head.second.weight.T + head.second.bias), head.second_norm)
    logits = y @ model.bert.embeddings.word_embeddings.weight.T + head.bias
    output = model(batch)
    close(output.terms["sbo"].total, F.cross_entropy(logits, targets["labels"], reduction="sum"))
    losses = output.losses()  # with weight 1 each
    close(output.loss.detach(), (losses["mlm"] + losses["sbo"]).double())


@pytest.mark.parametrize("text", ["mlm+nsp", "mlm+sop", "reorder"])
def test_classes_of_a_sequence(text: str) -> None:
    model, batch = made(text)
    name = text.removeprefix("mlm+")
    first = states_of(model, batch)[batch.inputs.cu_seqlens[:-1].long()]
    assert model.bert.pooler is not None
    logits = model.heads[name](torch.tanh(model.bert.pooler.dense(first)))
    output = model(batch, measure=True)
    labels = batch.targets[name]["labels"]
    close(output.terms[name].total, F.cross_entropy(logits, labels, reduction="sum"))
    assert output.terms[name].correct == (logits.argmax(1) == labels).sum()


@pytest.mark.parametrize("name", ["capitalised", "elsewhere"])
def test_facts_of_tokens(name: str) -> None:
    model, batch = made("capitalised+elsewhere")
    targets = batch.targets[name]
    x = states_of(model, batch)[batch.places(targets["index"])]
    p = torch.sigmoid(model.heads[name](x)[:, 0])
    labels = targets["labels"]
    expected = -torch.where(labels, p.log(), (1 - p).log()).sum()
    output = model(batch, measure=True)
    close(output.terms[name].total, expected)
    assert output.terms[name].correct == ((p > 0.5) == labels).sum()
    assert output.terms[name].chance == max(labels.sum(), (~labels).sum())


def test_replaced_tokens() -> None:
    """L_MLM of the generator on the masked text; the encoder's input has what was sampled; 50 times
    the mean over all tokens of -log p(replaced?)."""
    model, batch = made("rtd")
    targets, head = batch.targets["rtd"], model.heads["rtd"]
    words = model.bert.embeddings.word_embeddings.weight
    torch.manual_seed(4)
    hidden = head.generator(model.bert, batch.inputs, targets["place"])
    logits = hidden @ words.T + head.generator.bias
    sampled = sample_tokens(hidden, words, head.generator.bias)
    ids = batch.inputs.input_ids.clone()
    ids[targets["place"]] = sampled
    replaced = torch.zeros(len(ids), dtype=torch.bool)
    replaced[targets["place"]] = sampled != targets["labels"]
    x = encode(model.bert, batch.replace(inputs=batch.inputs.replace(input_ids=ids), rows=None))
    score = (head.out.weight @ F.gelu(head.dense(x)).T + head.out.bias[:, None])[0]
    torch.manual_seed(4)
    output = model(batch)
    close(output.terms["rtd/generator"].total,
          F.cross_entropy(logits, targets["labels"], reduction="sum"))  # fmt: skip
    expected = F.binary_cross_entropy_with_logits(score, replaced.double(), reduction="sum")
    close(output.terms["rtd"].total, expected)
    assert output.counts == {"rtd/generator": len(sampled), "rtd": batch.inputs.num_tokens}
    mean = expected / batch.inputs.num_tokens
    close(output.loss, output.losses()["rtd/generator"].double() + 50 * mean)


def test_no_gradient_goes_through_the_sample() -> None:
    model, batch = made("rtd")
    output = model(batch)
    generator = list(model.heads["rtd"].generator.parameters())
    gradients = torch.autograd.grad(
        output.terms["rtd"].total, generator, retain_graph=True, allow_unused=True
    )
    assert all(gradient is None for gradient in gradients)
    gradients = torch.autograd.grad(
        output.terms["rtd/generator"].total,
        [*generator, model.bert.embeddings.word_embeddings.weight],
    )
    assert all(gradient.abs().max() > 0 for gradient in gradients)  # the tables are the encoder's


def test_a_sample_that_is_the_original_is_original() -> None:
    """A generator that is sure of token 9: where 9 was masked nothing counts as replaced."""
    objectives = parse("rtd")
    model = model_of(objectives)
    with torch.no_grad():
        model.heads["rtd"].generator.bias[9] = 1e6
    examples = texts(16, 20)
    for x in examples:
        x.ids[x.ordinary] = 9
    examples[1].ids[[3, 4, 5]] = 8
    batch = batch_of(objectives, examples)
    rewritten, _ = objectives[0].rewrite(model.heads["rtd"], model.bert, batch, False)
    place, labels = batch.targets["rtd"]["place"], batch.targets["rtd"]["labels"]
    assert (rewritten.inputs.input_ids[place] == 9).all()
    replaced = rewritten.targets["rtd"]["replaced"]
    assert replaced.nonzero().flatten().tolist() == place[labels != 9].tolist()


def test_samples_are_of_the_softmax() -> None:
    """At temperature 1."""
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 4), torch.randn(12)
    hidden = torch.randn(1, 4)
    p = torch.softmax(hidden @ weight.T + bias, 1)[0]
    counts = torch.bincount(sample_tokens(hidden.expand(100_000, 4), weight, bias), minlength=12)
    assert ((counts - 1e5 * p).abs() < 5 * (1e5 * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("hidden, divisor, width, heads", [
    (256, 4, 64, 1), (768, 3, 256, 4), (1024, 4, 256, 4), (128, 4, 32, 1),
])  # fmt: skip
def test_generator_sizes(hidden: int, divisor: int, width: int, heads: int) -> None:
    """ELECTRA's small, base and large, and a tiny one."""
    config = CONFIG.replace(hidden_size=hidden, num_attention_heads=max(1, hidden // 64))
    small = generator_config(config, divisor)
    assert (small.hidden_size, small.num_attention_heads) == (width, heads)
    assert small.intermediate_size == 4 * width and small.num_hidden_layers == 3
    assert generator_config(config) == small  # what the paper gives each of these sizes


def test_bart() -> None:
    model, batch = made("bart")
    targets, heads, x = batch.targets["bart"], model.heads["bart"], states_of(model, batch)
    output = model(batch, measure=True)

    def at(name: str) -> Tensor:
        return x[batch.places(targets[name])]

    head = heads["tokens"]
    h = torch.cat((at("slot_index"), head.offsets.weight[targets["offset"]]), 1)
    h = norm(F.gelu(head.first(h)), head.first_norm)
    y = norm(F.gelu(head.second(h)), head.second_norm)
    logits = y @ model.bert.embeddings.word_embeddings.weight.T + head.bias
    expected = {"tokens": F.cross_entropy(logits, targets["tokens"], reduction="sum")}
    for term, labels in (("length", "lengths"), ("order", "order")):
        expected[term] = F.cross_entropy(
            heads[term](at(f"{term}_index")), targets[labels], reduction="sum"
        )
    p = torch.sigmoid(heads["inserted"](at("inserted_index"))[:, 0])
    expected["inserted"] = -torch.where(targets["inserted"], p.log(), (1 - p).log()).sum()
    scores = heads["start"](x)[:, 0].split(batch.inputs.lengths)
    expected["start"] = -sum(
        s.log_softmax(0)[t] for s, t in zip(scores, targets["start"], strict=True)
    )
    assert {f"bart/{term}" for term in expected} == set(output.terms)
    for term, total in expected.items():
        close(output.terms[f"bart/{term}"].total, total)
        assert output.counts[f"bart/{term}"] > 0


@pytest.mark.parametrize("text", ALL)
def test_every_parameter_learns(text: str) -> None:
    """A gradient reaches every parameter, none of them zero but where the text has no such row."""
    model, batch = made(text)
    model(batch).loss.backward()
    rows = ("word_embeddings", "position_embeddings", "token_type_embeddings", "offsets")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not any(row in name for row in rows):
            assert parameter.grad.abs().max() > 0 or name.endswith("key.bias"), name


@pytest.mark.parametrize("text", ALL)
def test_mixed_precision(text: str) -> None:
    """Under autocast to bf16: losses in fp32, near those of fp32."""
    model, batch = made(text)
    model.float()
    torch.manual_seed(1)
    exact = model(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch, measure=True)
    mixed.loss.backward()
    for name, term in mixed.terms.items():
        assert term.total.dtype == torch.float32
        if name != "rtd":  # which tokens are sampled hangs on the last bit
            torch.testing.assert_close(term.total, exact.terms[name].total, rtol=0.05, atol=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("text", ALL)
def test_nothing_to_ask(text: str) -> None:
    """A batch without a target has a finite loss, and gradients of zero rather than none."""
    objectives = parse(text, None, NOISE if text == "bart" else None)
    model = model_of(objectives)
    batch = batch_of(objectives, [x.replace(relation=-1) for x in texts(3, 3)])
    output = model(batch, measure=True)
    assert torch.isfinite(output.loss)
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_divisors_make_a_mean_over_several_batches() -> None:
    """Two batches, each with the number of targets of both, give the gradient of one of all."""
    for text in ("mlm+nsp", "bart", "mlm+sbo"):
        objectives = parse(text, None, NOISE if text == "bart" else None)
        model = model_of(objectives)
        examples = texts(20, 31, 8, 12, 9)
        whole = batch_of(objectives, examples)
        prepared = prepared_by(objectives, examples)
        parts = [collate(prepared[:2]), collate(prepared[2:])]
        counts = [model.counts(part) for part in parts]
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        assert total == model.counts(whole)
        model(whole).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for part in parts:
            model(part, divisors=total).loss.backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            close(p.grad, gradient)


def test_measures_of_many_rows() -> None:
    """Right answers are counted in chunks; a term without rows counts none."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5000, 8), torch.randn(V * 200, 8)
    labels = torch.randint(0, V * 200, (5000,))
    best = (hidden @ weight.T).argmax(1)
    labels[::3] = best[::3]
    term = token_term(hidden, weight, None, labels, True)
    assert term.correct is not None and float(term.correct) == float((best == labels).sum())
    none = class_term(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), True)
    assert float(none.total) == float(none.correct) == float(none.chance) == 0.0  # type: ignore[arg-type]
