"""Encoder against the same model in torch: vectors, labels, spans; and what it must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.runtime import Encoder

ROOT = Path(fastbert.__file__).parents[1]


def test_it_imports_no_torch(saved: Any) -> None:
    _, folder = saved("BertForSequenceClassification")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from fastbert.runtime import Encoder, SentenceEncoder, encode_file\n"
        "import fastbert.cli.encode\n"
        f"encoder = Encoder({str(folder)!r})\n"
        "encoder.encode(['the cat']), encoder.classify(['the cat'])\n"
        "SentenceEncoder(encoder).encode('the cat')\n"
        "heavy = {'torch', 'transformers', 'triton', 'sentence_transformers', 'accelerate'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("scheme", ["int8-dynamic", "bf16"])
def test_the_vectors_are_those_of_the_model_in_torch(
    scheme: str, saved: Any, texts: list[str], padded: Any
) -> None:
    quantised, folder = saved(scheme=scheme)
    encoder, inputs = Encoder(folder), padded(texts)
    with torch.no_grad():
        out = quantised(**inputs)
    mask = inputs["attention_mask"][:, :, None]
    x = out.last_hidden_state
    expected = {
        "cls": x[:, 0],
        "mean": (x * mask).sum(1) / mask.sum(1),
        "max": x.masked_fill(mask == 0, -torch.inf).amax(1),
        "pooler": out.pooler_output,
    }
    for pooling, wanted in expected.items():
        got = encoder.encode(texts, pooling=pooling)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-6, atol=2e-6)
        got = encoder.encode(texts, pooling=pooling, normalize=True)
        np.testing.assert_allclose(got, F.normalize(wanted).numpy(), rtol=2e-6, atol=2e-6)


def test_batches_do_not_change_a_bit(saved: Any, texts: list[str]) -> None:
    encoder = Encoder(saved()[1])
    many = texts * 40
    expected = encoder.encode(texts)
    for batch_tokens in (1, 30, 10**6):
        assert np.array_equal(encoder.encode(many, batch_tokens=batch_tokens)[-6:], expected)
    alone = [encoder.encode([text])[0] for text in texts]
    assert np.array_equal(alone, expected)
    assert np.array_equal(Encoder(encoder.saved.folder, num_threads=3).encode(texts), expected)
    assert encoder.encode([]).shape == (0, 48)


def test_memory_that_is_let_go_can_be_read_again(saved: Any) -> None:
    quantised, folder = saved()
    read = Encoder(folder).saved.encoder_arrays()
    assert all(np.array_equal(x, read[name]) for name, x in quantised.encoder.tensors.items())


def test_token_ids_in_place_of_texts(saved: Any, texts: list[str]) -> None:
    encoder = Encoder(saved()[1])
    expected = encoder.encode(texts)
    ids = encoder.tokenize(texts).ids
    assert max(map(len, ids)) == encoder.max_length == 24
    assert np.array_equal(encoder.encode(ids), expected)
    assert np.array_equal(encoder.encode([i.tolist() for i in ids]), expected)
    assert not encoder.encode([[], [2, 3]])[0].any()
    assert not encoder.encode([[]]).any()
    assert encoder.encode([np.arange(2, 5, dtype=np.int32)]).shape == (1, 48)


def test_bad_input_is_a_clear_error(saved: Any) -> None:
    encoder = Encoder(saved()[1])
    for wrong, message in (
        ("one text", "expected a list"),
        ([[1.5]], "token ids"),
        (["a", 3], "expected texts"),
        ([[0] * 25], "25 tokens, expected at most 24"),
        ([[97]], "input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(wrong)
    with pytest.raises(ValueError, match="pooling"):
        encoder.encode(["a"], pooling="sum")
    with pytest.raises(ValueError, match="batch_tokens"):
        encoder.encode(["a"], batch_tokens=0)
    with pytest.raises(ValueError, match="num_threads"):
        Encoder(encoder.saved.folder, num_threads=0)
    for call in (encoder.classify, encoder.tag):
        with pytest.raises(ValueError, match="holds BertModel"):
            call(["a"])


def test_a_model_without_a_tokenizer_takes_ids_only(saved: Any, tmp_path: Path) -> None:
    quantised, _ = saved()
    quantised.facts["tokenizer_json"] = None
    quantised.save_pretrained(tmp_path / "bare")
    encoder = Encoder(tmp_path / "bare")
    assert encoder.encode([[2, 3]]).shape == (1, 48)
    with pytest.raises(ValueError, match="without a tokenizer"):
        encoder.encode(["a"])


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_classify(problem: str, saved: Any, texts: list[str], padded: Any) -> None:
    names = {0: "low"} if problem == "regression" else {0: "low", 1: "middle", 2: "high"}
    quantised, folder = saved("BertForSequenceClassification", id2label=names, problem_type=problem)
    inputs = [*texts, ("the cat", "ran far")]
    found = Encoder(folder).classify(inputs)
    with torch.no_grad():
        logits = torch.cat(
            [quantised(**padded([text])).logits for text in inputs]
        )  # pairs and texts do not share a call of the tokenizer
    if problem == "single_label_classification":
        logits = logits.softmax(1)
    elif problem == "multi_label_classification":
        logits = logits.sigmoid()
    for row, result in zip(logits, found, strict=True):
        assert list(result.scores) == list(names.values())
        assert list(result.scores.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert result.label == names[int(row.argmax())]
        assert result.score == max(result.scores.values())


def test_tag(saved: Any, padded: Any) -> None:
    names = {0: "O", 1: "B", 2: "I"}
    quantised, folder = saved("BertForTokenClassification", id2label=names)
    encoder, text = Encoder(folder), "The cats, sitting far"
    (tokens,) = encoder.tag([text])
    assert [t.text for t in tokens][:4] == ["The", "cat", "s", ","]
    assert all(t.text == text[t.start : t.end] for t in tokens)
    with torch.no_grad():
        scores = quantised(**padded([text])).logits.softmax(2)[0, 1 : len(tokens) + 1]
    assert [t.label for t in tokens] == [names[int(i)] for i in scores.argmax(1)]
    assert [t.score for t in tokens] == pytest.approx(scores.amax(1).tolist(), abs=1e-5)


def test_tag_covers_a_long_text_once(saved: Any) -> None:
    _, folder = saved("BertForTokenClassification")
    encoder = Encoder(folder)
    words = [word for _ in range(20) for word in ("the", "cat", "sat", "far")]
    text = " ".join(words)
    for stride in (0, 1, 8, 15):
        (tokens,) = encoder.tag([text], stride=stride)
        assert [t.text for t in tokens] == words
        assert [t.start for t in tokens] == sorted({t.start for t in tokens})
    # A token with whole windows around it does not depend on where the windows are cut …
    short = encoder.tag([" ".join(words[:22])])[0]
    assert short == encoder.tag([" ".join(words[:22])], stride=3)[0]
    with pytest.raises(ValueError, match="stride"):
        encoder.tag([text], stride=22)


def test_answer_is_the_best_span(saved: Any, padded: Any) -> None:
    quantised, folder = saved("BertForQuestionAnswering")
    question, context = "the dog?", "the cat sat on the mat, far."
    answer = Encoder(folder).answer(question, context, max_answer_tokens=4)
    inputs = padded([(question, context)])
    with torch.no_grad():
        out = quantised(**inputs)
    inside = (inputs["token_type_ids"] == 1) & (inputs["input_ids"] != 3)
    inside &= inputs["attention_mask"] == 1
    start = out.start_logits.masked_fill(~inside, -torch.inf)[0]
    end = out.end_logits.masked_fill(~inside, -torch.inf)[0]
    spans = [(float(start[i] + end[j]), i, j) for i in range(24) for j in range(i, min(24, i + 4))]
    best, i, j = max(spans)
    assert answer.text == context[answer.start : answer.end] != ""
    assert answer.score == pytest.approx(float(start.softmax(0)[i] * end.softmax(0)[j]), abs=1e-5)


def test_answer_reads_all_of_a_long_context(saved: Any) -> None:
    _, folder = saved("BertForQuestionAnswering")
    encoder = Encoder(folder)
    words = ["the cat sat on the mat"] * 9
    found = encoder.answer("the dog?", " ".join(words), stride=5)
    assert 0.0 < found.score <= 1.0 and found.text
    assert encoder.answer("the dog?", "") == ("", 0, 0, 0.0)
    with pytest.raises(ValueError, match="stride"):
        encoder.answer("the dog " * 12, "the cat")


def test_prompts(saved: Any, tmp_path: Path) -> None:
    quantised, _ = saved()
    quantised.facts.update(prompts={"query": "dog: "}, default_prompt="query")
    quantised.save_pretrained(tmp_path / "prompted")
    encoder = Encoder(tmp_path / "prompted")
    expected = encoder.encode(["dog: far"], prompt="")
    assert np.array_equal(encoder.encode(["far"]), expected)
    assert np.array_equal(encoder.encode(["far"], prompt="dog: "), expected)
    assert not np.array_equal(encoder.encode(["far"], prompt=""), expected)


def test_roberta_positions_start_behind_the_padding_index(tmp_path: Path) -> None:
    from ..hf._models import batch_for, tiny

    quantised = fastbert.quantize(tiny("RobertaForSequenceClassification"))
    quantised.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    batch = batch_for("RobertaForSequenceClassification")
    del batch["labels"], batch["token_type_ids"]
    rows = (batch["input_ids"], batch["attention_mask"])
    ids = [i[m != 0].tolist() for i, m in zip(*rows, strict=True)]
    with torch.no_grad():
        expected = quantised(**batch).logits.softmax(1)
    found = encoder.classify(ids)
    for row, result in zip(expected, found, strict=True):
        assert list(result.scores.values()) == pytest.approx(row.tolist(), abs=1e-5)
    assert encoder.max_length == 40


@pytest.mark.parametrize("family", ["Albert", "Camembert", "DistilBert", "Electra", "XLMRoberta"])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_heads_of_every_family(family: str, task: str, tmp_path: Path) -> None:
    from ..hf._models import batch_for, tiny

    name = f"{family}For{task}"
    quantised = fastbert.quantize(tiny(name))
    quantised.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    batch = {k: x for k, x in batch_for(name).items() if k in ("input_ids", "attention_mask")}
    rows = (batch["input_ids"], batch["attention_mask"])
    ids = [i[m != 0].tolist() for i, m in zip(*rows, strict=True)]
    with torch.no_grad():
        logits = quantised(**batch).logits
    if task == "SequenceClassification":
        for row, result in zip(logits.softmax(1), encoder.classify(ids), strict=True):
            assert list(result.scores.values()) == pytest.approx(row.tolist(), abs=1e-5)
    else:
        for index, lengths, x in encoder.states(encoder.tokenize(ids)):
            parts = np.split(encoder._head.of_tokens(x), np.cumsum(lengths)[:-1])
            for i, part in zip(index, parts, strict=True):
                wanted = logits[i][batch["attention_mask"][i] != 0].numpy()
                np.testing.assert_allclose(part, wanted, atol=1e-5)
