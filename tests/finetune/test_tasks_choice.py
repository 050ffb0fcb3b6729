"""choice: a sequence a choice, packed side by side."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastbert.config import BertConfig
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS, task_of

from ._samples import make_small_tokenizer, one_hot, run, table, texts_of

SMALL = make_small_tokenizer()
Choice = TASKS["choice"]
ROWS = table(
    text=["the cat", "a dog"],
    choices=[["sat .", "was good"], ["in new york", "on the mat ."]],
    label=["0", "1"],
)


def test_choices_are_sequences_side_by_side() -> None:
    task = Choice.open(ROWS)
    features = task.encode(ROWS, SMALL, max_length=20)
    assert texts_of(features, SMALL)[0] == (
        "[CLS] the cat [SEP] sat . [SEP] [CLS] the cat [SEP] was good [SEP]"
    )
    inputs = task.collate([features[0], features[1]])
    assert inputs["num_choices"] == 2
    assert inputs["labels"].tolist() == [0, 1]
    assert inputs["batch"].lengths == (7, 7, 8, 9)
    assert inputs["batch"].position_ids[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert features.lengths.tolist() == [14, 17]


def test_the_question_stands_before_each_choice() -> None:
    rows = table(**ROWS.columns, question=["who ?", "where ?"])
    features = Choice.open(rows).encode(rows, SMALL, max_length=20)
    assert texts_of(features, SMALL)[0] == (
        "[CLS] the cat [SEP] who ? sat . [SEP] [CLS] the cat [SEP] who ? was good [SEP]"
    )


def test_what_is_too_long_is_cut_and_counted() -> None:
    rows = table(
        text=["the cat sat on the mat", "a dog"],
        choices=[["in new york", "was good"], ["sat", "."]],
        label=[0, 1],
    )
    features = Choice.open(rows).encode(rows, SMALL, max_length=9)
    assert features.truncated == 1
    assert texts_of(features, SMALL)[0] == (
        "[CLS] the cat sat [SEP] in new york [SEP] [CLS] the cat sat on [SEP] was good [SEP]"
    )


def test_from_rows_to_scores(one_thread: None) -> None:
    task = Choice.open(ROWS)
    features = task.encode(task.check(ROWS, BadRows()), SMALL, max_length=20)
    predictions = task.decode(run(task, features, batch=2), features, ROWS)
    json.dumps(predictions)
    assert task.scores(predictions, ROWS).keys() == {"accuracy", "calibration_error"}
    bare = table(text=ROWS.columns["text"], choices=ROWS.columns["choices"])
    features = task.encode(
        task.check(bare, BadRows(), labelled=False), SMALL, max_length=20, labelled=False
    )
    assert task.decode(run(task, features, batch=2), features, bare) == predictions


def test_scores_by_hand() -> None:
    task = Choice.open(ROWS)
    features = task.encode(ROWS, SMALL, max_length=20)
    predictions = task.decode(one_hot([0, 0], 2), features, ROWS)
    assert [p["choice"] for p in predictions] == [0, 0]
    probability = 1 / (1 + np.exp(-9))
    assert predictions[0]["probabilities"]["0"] == pytest.approx(probability)
    assert task.scores(predictions, ROWS)["accuracy"].value == 0.5
    outcomes = task.outcomes(predictions, ROWS)
    assert outcomes is not None
    assert (outcomes.gold.tolist(), outcomes.predicted.tolist()) == ([0, 1], [0, 0])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([1, 2, 3], ["1", "2", "3"]),
        (["A", "C", "A"], ["A", "B", "C"]),
        (["b", "c", "b"], ["a", "b", "c"]),
        (["1", "2", "1"], ["0", "1", "2"]),  # either way: from 0
    ],
)
def test_how_labels_call_choices(labels: list[Any], names: list[str]) -> None:
    rows = table(text=["the cat"] * 3, choices=[["sat", "was", "."]] * 3, label=labels)
    task = Choice.open(rows)
    assert task.state() == {"task": "choice", "names": tuple(names)}
    features = task.encode(task.check(rows, BadRows()), SMALL, max_length=20)
    found = [names[i] for i in features.per_feature["labels"]]
    assert found == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1], "label: all rows have '1', expected two labels or more"),
        ([None, ""], "label: no row has one"),
        (["left", "right"], "label: got 'left', 'right', expected '0', '1' or 'A', 'B'"),
    ],
)
def test_nothing_to_learn(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice.open(table(text=["x"] * 2, choices=[["sat", "was"]] * 2, label=labels))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("text", "", "empty text"),
        ("choices", ["sat", " "], "empty choice"),
        ("choices", ["sat", None], "no choice$"),
        ("choices", ["sat"], r"no choices: got \['sat'\], expected a list of texts"),
        ("choices", "sat", "no choices"),
        ("choices", ["a", "b", "c"], "another number of choices: got 3, expected 2"),
        ("choices", {"ending0": "a", "ending1": ""}, "empty choice"),
        ("label", None, "no label: got None"),
        ("label", 2, "unknown label: got '2', expected '0', '1'"),
    ],
)
def test_bad_rows(name: str, value: Any, reason: str) -> None:
    task = Choice.open(ROWS)
    changed = {**ROWS.columns, name: [ROWS.columns[name][0], value]}
    with pytest.raises(ValueError, match=f"^dev, row 2: {reason}"):
        task.check(Table.of("dev", **changed), BadRows())
    bad = BadRows(skip=True)
    assert len(task.check(Table.of("dev", **changed), bad)) == bad.count == 1


def test_state_and_config() -> None:
    task = Choice.open(ROWS)
    assert task_of(json.loads(json.dumps(task.state()))).state() == task.state()
    foreign = Choice.from_config(BertConfig())
    features = foreign.encode(foreign.check(ROWS, BadRows()), SMALL, max_length=20)
    assert features.per_feature["labels"].tolist() == [0, 1]
