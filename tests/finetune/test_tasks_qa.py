"""qa: answers as tokens and back, windows, questions without an answer, and every bad answer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import BertConfig
from fastbert.finetune.features import Features
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS, task_of
from fastbert.finetune.tasks.qa import QuestionAnswering

from ._samples import make_small_tokenizer, run, table

SMALL = make_small_tokenizer()
CONTEXT = "The Café (308½ cats)  sat in New York . A dog was on the mat , the city was good !"


def answer(text: str, context: str = CONTEXT) -> dict[str, list]:
    return {"text": [text], "answer_start": [context.index(text)]}


ROWS = table(
    question=["who sat ?", "where ?", "who was good ?"],
    context=[CONTEXT, CONTEXT, "the cat"],
    answers=[answer("308½ cats"), answer("New York"), answer("the cat", "the cat")],
)
NONE = {"text": [], "answer_start": []}


def gold_logits(features: Features) -> list[np.ndarray]:
    """Logits that say what the labels say."""
    outputs = []
    for i in range(len(features)):
        example = features[i]
        logits = np.zeros((len(example["input_ids"]), 2), np.float32)
        for column, name in enumerate(("start_positions", "end_positions")):
            if example[name] < len(logits):
                logits[example[name], column] = 9
        outputs.append(logits)
    return outputs


def test_positions() -> None:
    task = QuestionAnswering.open(ROWS)
    assert task.config()["num_labels"] == 2
    features = task.encode(ROWS, SMALL, max_length=50)
    assert len(features) == 3
    for i, text in enumerate(["[UNK] cat ##s", "new york", "the cat"]):
        example = features[i]
        span = example["input_ids"][example["start_positions"] : example["end_positions"] + 1]
        assert " ".join(SMALL.id_to_token(int(j)) for j in span) == text
    inputs = task.collate([features[0], features[2]])
    assert inputs["start_positions"].shape == (2,)
    assert inputs["batch"].lengths == (len(features[0]["input_ids"]), 9)


def test_gold_positions_give_back_the_answers() -> None:
    task = QuestionAnswering.open(ROWS)
    for max_length, stride in ((50, None), (16, 5), (14, 5)):
        features = task.encode(ROWS, SMALL, max_length=max_length, stride=stride)
        assert features.lengths.max() <= max_length
        predictions = task.decode(gold_logits(features), features, ROWS)
        assert [p["answer"] for p in predictions] == ["308½ cats", "New York", "the cat"]
        for prediction, context in zip(predictions, ROWS.columns["context"], strict=True):
            span = context[prediction["start"] : prediction["end"]]
            assert prediction["answer"] == span
        scores = task.scores(predictions, ROWS)
        assert scores["exact_match"].value == scores["f1"].value == 1


words = st.lists(
    st.sampled_from(["cat", "Café", "308½", "(unable)", "São\u3000x", "\u200b", "e\u0301", "-"]),
    min_size=1,
    max_size=20,
)


@given(words, st.data())
@settings(deadline=None, max_examples=80)
def test_answers_of_whole_words_come_back(parts: list[str], data: st.DataObject) -> None:
    context = " ".join(parts)
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(parts) - 1)))
    text = " ".join(parts[first : last + 1])
    if text.strip(" \u200b") == "" or context.strip(" \u200b") == "":
        return
    start = len(" ".join(parts[:first])) + (first > 0)
    rows = table(
        question=["who ?"], context=[context], answers=[{"text": [text], "answer_start": [start]}]
    )
    task = QuestionAnswering.open(rows)
    assert task.check(rows, BadRows()) is rows
    features = task.encode(rows, SMALL, max_length=50, stride=20)
    (found,) = task.decode(gold_logits(features), features, rows)
    assert context[found["start"] : found["end"]] == found["answer"]
    # The tokenizer makes nothing of joiners: those at the ends of an answer have no token.
    assert found["answer"].strip(" \u200b") == text.strip(" \u200b")


def test_windows_without_the_answer_have_cls() -> None:
    task = QuestionAnswering.open(ROWS)
    features = task.encode(ROWS, SMALL, max_length=16, stride=5)
    starts = features.per_feature["start_positions"]
    first = features.row == 0
    assert first.sum() > 2 and (starts[first] == 0).any() and (starts[first] > 0).any()
    assert features.truncated == 0


def test_an_answer_that_no_window_holds_does_not_count(one_thread: None) -> None:
    rows = table(
        question=["who ?"] * 2, context=[CONTEXT] * 2, answers=[answer(CONTEXT), answer("York")]
    )
    task = QuestionAnswering.open(rows)
    features = task.encode(rows, SMALL, max_length=16, stride=5)
    assert features.truncated == 1
    first = features.row == 0
    assert (features.per_feature["start_positions"][first] == 16).all()
    assert (features.per_feature["end_positions"][~first] < 16).all()
    run(task, features, batch=len(features))  # its loss is finite: the other row's


def test_a_long_question_is_cut_and_counted() -> None:
    rows = table(question=["who was good ? " * 10], context=[CONTEXT], answers=[answer("York")])
    features = QuestionAnswering.open(rows).encode(rows, SMALL, max_length=23)
    assert features.truncated == 1
    assert (features.lengths <= 23).all()
    question = (features[0]["token_type_ids"] == 0).sum()
    assert question == 10 + 2  # half of the 20 tokens beside the special ones


def test_from_rows_to_scores(one_thread: None) -> None:
    task = QuestionAnswering.open(ROWS)
    features = task.encode(ROWS, SMALL, max_length=16)
    predictions = task.decode(run(task, features), features, ROWS)
    json.dumps(predictions)
    assert all(0 < p["score"] < 1 and p["answer"] for p in predictions)
    assert task.scores(predictions, ROWS).keys() == {"exact_match", "f1"}
    bare = table(question=ROWS.columns["question"], context=ROWS.columns["context"])
    features = task.encode(
        task.check(bare, BadRows(), labelled=False), SMALL, max_length=16, labelled=False
    )
    assert task.decode(run(task, features), features, bare) == predictions


def test_the_score_is_a_probability() -> None:
    """Of one window with context tokens 0 and 1: softmax of starts times softmax of ends."""
    rows = table(question=["who ?"], context=["the cat"], answers=[answer("cat", "the cat")])
    task = QuestionAnswering.open(rows)
    features = task.encode(rows, SMALL, max_length=20)
    logits = np.full((len(features[0]["input_ids"]), 2), 50, np.float32)
    logits[5], logits[6] = (1, 2), (3, 5)  # [CLS] who ? [SEP] the cat [SEP]: 4 and 5 are text
    logits[4] = (1, 2)
    logits[5] = (3, 5)
    (found,) = task.decode([logits], features, rows)
    assert found["answer"] == "cat"
    expected = 1 / (1 + np.exp(1 - 3)) * 1 / (1 + np.exp(2 - 5))
    assert found["score"] == pytest.approx(expected)


def test_answers_are_no_longer_than_the_most() -> None:
    rows = table(question=["who ?"], context=[CONTEXT], answers=[answer("York")])
    task = QuestionAnswering(max_answer_tokens=2)
    features = task.encode(rows, SMALL, max_length=50)
    logits = np.zeros((int(features.lengths[0]), 2), np.float32)
    logits[4, 0] = logits[-2, 1] = 9
    (found,) = task.decode([logits], features, rows)
    assert len(SMALL.encode(found["answer"], add_special_tokens=False)) <= 2


def test_questions_without_an_answer() -> None:
    rows = table(
        question=["who sat ?", "who was good ?"],
        context=[CONTEXT, CONTEXT],
        answers=[answer("York"), NONE],
    )
    task = QuestionAnswering.open(rows)
    assert task.impossible
    features = task.encode(task.check(rows, BadRows()), SMALL, max_length=16, stride=5)
    assert (features.per_feature["start_positions"][features.row == 1] == 0).all()
    predictions = task.decode(gold_logits(features), features, rows)
    assert [p["answer"] for p in predictions] == ["York", ""]
    assert predictions[1]["start"] == predictions[1]["end"] == 0
    assert 0 < predictions[1]["score"] <= 1
    assert task.scores(predictions, rows)["exact_match"].value == 1
    # A model that always answers gives the best span there is.
    assert all(p["answer"] for p in QuestionAnswering().decode(
        gold_logits(features), features, rows))  # fmt: skip


@pytest.mark.parametrize(
    ("value", "start"),
    [
        (answer("New York"), None),
        ([{"text": "New York", "answer_start": 30}], None),
        (json.dumps({"text": ["New York"], "answer_start": [30]}), None),
        ("New York", "30"),
        ("New York", None),
    ],
)
def test_the_ways_to_write_an_answer(value: Any, start: str | None) -> None:
    value = json.loads(json.dumps(value).replace("30", str(CONTEXT.index("New York"))))
    columns = {"question": ["where ?"], "context": [CONTEXT], "answers": [value]}
    if start is not None:
        columns["answer_start"] = [str(CONTEXT.index("New York"))]
    rows = table(**columns)
    task = QuestionAnswering.open(rows)
    features = task.encode(task.check(rows, BadRows()), SMALL, max_length=50)
    (found,) = task.decode(gold_logits(features), features, rows)
    assert found["answer"] == "New York"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"text": ["Oslo"], "answer_start": [4]}, "answer is not in its context: got 'Oslo'"),
        (
            {"text": ["York"], "answer_start": [4]},
            "answer is not at its place: 'York' does not stand at character 4 of the context, "
            f"but only at {CONTEXT.index('York')}",
        ),
        (
            {"text": ["was"], "answer_start": [4]},
            "answer is not at its place: 'was' does not stand at character 4 .*, but 2 times",
        ),
        ({"text": ["York"], "answer_start": [-5]}, "answer is not at its place"),
        ({"text": [" "], "answer_start": [3]}, "empty answer"),
        ({"text": ["York"], "answer_start": []}, "no answers: got "),
        ({"text": ["York"]}, "no answers: got "),
        ([{"text": "York", "answer_start": None}], "no answers: got "),
        ([7], "no answers"),
        (None, "no answers: got None"),
        (float("nan"), "no answers: got nan"),
        ("", "no answers: got ''"),
        ("{not JSON", "no answers"),
        ("was", "answer without its place: 'was' stands in the context 2 times"),
    ],
)
def test_bad_answers(value: Any, reason: str) -> None:
    task = QuestionAnswering.open(ROWS)
    wrong = Table.of("dev.json", question=["who ?"] * 2, context=[CONTEXT] * 2,
                     answers=[value, answer("York")])  # fmt: skip
    with pytest.raises(ValueError, match=f"^dev.json, row 1: {reason}"):
        task.check(wrong, BadRows())
    bad = BadRows(skip=True)
    assert task.check(wrong, bad).numbers.tolist() == [2]
    assert bad.count == 1


def test_bad_texts_and_nothing_to_learn() -> None:
    task = QuestionAnswering.open(ROWS)
    for name in ("question", "context"):
        wrong = Table.of("dev", **{**ROWS.columns, name: ["", "x", "y"]})
        with pytest.raises(ValueError, match=f"^dev, row 1: empty {name}"):
            task.check(wrong, BadRows(), labelled=False)
    with pytest.raises(ValueError, match="train.csv: answers: no row has one"):
        QuestionAnswering.open(table(question=["x"], context=["y"], answers=[NONE]))


def test_state_and_config() -> None:
    task = QuestionAnswering(impossible=True, max_answer_tokens=7)
    assert task_of(json.loads(json.dumps(task.state()))).state() == task.state()
    assert TASKS["qa"].from_config(BertConfig()).state() == QuestionAnswering().state()
