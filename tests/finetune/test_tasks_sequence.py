"""classify, regress, pairs, multilabel: labels discovered, rows checked, windows pooled, scored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.config import BertConfig
from fastbert.finetune.columns import TARGETS
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS, Task, task_of
from fastbert.finetune.tasks.targets import are_classes, class_name

from ._samples import make_small_tokenizer, one_hot, run, table, texts_of

SMALL = make_small_tokenizer()
TEXTS = ["the cat sat", "a bad film", "the film was good . , the film was bad", "a dog !"]
PAIRS = {"text": TEXTS, "text_pair": TEXTS[::-1]}
LABELLED: dict[str, Table] = {
    "classify": table(text=TEXTS, label=["neg", "pos", "pos", "neg"]),
    "regress": table(text=TEXTS, label=["1.5", 2, 4.25, "-1e-3"]),
    "pairs": table(**PAIRS, label=["yes", "no", "yes", "no"]),
    "pairs on a scale": table(**PAIRS, label=["1.5", "2", "3.75", "5.0"]),
    "multilabel": table(text=TEXTS, labels=["a|b", "", "b", "c"]),
}


def open_task(case: str) -> tuple[Task, Table]:
    return TASKS[case.split()[0]].open(LABELLED[case]), LABELLED[case]


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LABELLED)
@pytest.mark.parametrize("max_length", [40, 8])
def test_from_rows_to_scores(case: str, max_length: int, one_thread: None) -> None:
    task, rows = open_task(case)
    assert task.check(rows, BadRows()) is rows
    features = task.encode(rows, SMALL, max_length=max_length)
    assert (len(features) > len(rows)) is (max_length == 8)
    predictions = task.decode(run(task, features), features, rows)
    assert len(json.loads(json.dumps(predictions))) == len(rows)
    scores = task.scores(predictions, rows)
    assert task.selects in scores
    assert all(score.low <= score.high for score in scores.values())


@pytest.mark.parametrize("case", LABELLED)
def test_without_labels_predictions_are_the_same(case: str, one_thread: None) -> None:
    task, rows = open_task(case)
    bare = Table.of(**{n: c for n, c in rows.columns.items() if n not in TARGETS})
    features = task.encode(task.check(bare, BadRows(), labelled=False), SMALL, max_length=8,
                           labelled=False)  # fmt: skip
    labelled = task.encode(rows, SMALL, max_length=8)
    assert "labels" not in task.collate([features[0]])
    found = task.decode(run(task, features), features, bare)
    expected = task.decode(run(task, labelled), labelled, rows)
    assert [p.keys() for p in found] == [p.keys() for p in expected]
    for name in expected[0]:
        assert [p[name] for p in found] == [p[name] for p in expected]


@pytest.mark.parametrize("case", LABELLED)
def test_state(case: str) -> None:
    task, rows = open_task(case)
    again = task_of(json.loads(json.dumps(task.state())))
    assert type(again) is type(task)
    assert again.config() == task.config()
    assert again.state() == task.state()


def test_unknown_state() -> None:
    with pytest.raises(ValueError, match="task: got 'summarise', expected one of classify"):
        task_of({"task": "summarise"})


@pytest.mark.parametrize("case", LABELLED)
def test_empty_texts_and_missing_labels_are_bad(case: str) -> None:
    task, rows = open_task(case)
    role = "labels" if case == "multilabel" else "label"
    for name, value, reason in [
        ("text", None, "no text"),
        ("text", float("nan"), "no text"),
        ("text", " \t\u200b", "empty text"),
        ("text", "\ufffd", "empty text"),
        ("text", 7, "text is not a text: got 7"),
        ("text", "x\ud800", "text is not Unicode"),
        (role, None, "no l"),
        (role, float("nan"), "no l"),
    ]:
        changed = dict(rows.columns)
        changed[name] = [*rows.columns[name][:2], value, *rows.columns[name][3:]]
        wrong = Table.of("dev.csv", **changed)
        with pytest.raises(ValueError, match=f"^dev.csv, row 3: {reason}"):
            task.check(wrong, BadRows())
        bad = BadRows(skip=True)
        good = task.check(wrong, bad)
        assert good.numbers.tolist() == [1, 2, 4]
        assert bad.count == 1


def test_no_row_and_no_column() -> None:
    task, rows = open_task("classify")
    with pytest.raises(ValueError, match="dev: none of its 2 rows can be used"):
        task.check(Table.of("dev", text=["", None], label=["pos", "pos"]), BadRows(skip=True))
    with pytest.raises(ValueError, match="dev: no column for 'label', which classify needs; its"):
        task.check(Table.of("dev", text=["x"]), BadRows(skip=True))


def test_the_logits_of_windows_are_averaged() -> None:
    task, rows = open_task("classify")
    features = task.encode(rows, SMALL, max_length=8, stride=1)
    assert features.row.tolist() == [0, 1, 2, 2, 3]
    assert features.windowed == 1 and features.truncated == 0
    assert features.per_feature["labels"].tolist() == [0, 1, 1, 1, 0]
    assert texts_of(features, SMALL)[2:4] == [
        "[CLS] the film was good . , [SEP]",
        "[CLS] , the film was bad [SEP]",
    ]
    outputs = [np.array(x, np.float32) for x in ([2, 0], [2, 0], [3, 0], [0, 4], [2, 0])]
    third = task.decode(outputs, features, rows)[2]
    assert third["label"] == "pos"
    assert third["probabilities"]["pos"] == pytest.approx(1 / (1 + np.exp(1.5 - 2)))


def test_pairs() -> None:
    task, rows = open_task("pairs")
    features = task.encode(rows.rows([0]), SMALL, max_length=40)
    assert texts_of(features, SMALL) == ["[CLS] the cat sat [SEP] a dog ! [SEP]"]
    assert features[0]["token_type_ids"].tolist() == [0] * 5 + [1] * 4
    batch = task.collate([features[0], features[0]])["batch"]
    assert batch.token_type_ids.tolist() == ([0] * 5 + [1] * 4) * 2


# --- classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", " b "], ("a", "b")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([3, 1.0, 2], ("1", "2", "3")),
        ([True, False, True], ("false", "true")),
        (["a", None, "b", float("nan"), "", "NaN"], ("a", "b")),
        (["None", "NA"], ("NA", "None")),  # names that people give
    ],
)
def test_classes_are_discovered(labels: list[Any], names: tuple[str, ...]) -> None:
    task = TASKS["classify"].open(table(text=["x"] * len(labels), label=labels))
    assert task.config() == {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def test_class_name() -> None:
    assert [class_name(x) for x in (1, 1.0, "1", " 1", 1.5, ["1"])] == [*["1"] * 4, "1.5", None]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 30, "train.csv: label: all rows have 'a', expected two classes or more"),
        ([None, ""] * 15, "train.csv: label: no row has one"),
        ([str(i) for i in range(30)], "got 29 different ones in 29 rows, .* right column"),
        ([i % 25 + 0.5 for i in range(100)], "got 25 different ones in 99 rows.*regress"),
        (["a"] * 29 + ["b"], "all rows have 'a'"),  # the only b has no text
    ],
)
def test_no_classes(labels: list[Any], message: str) -> None:
    texts = ["x"] * (len(labels) - 1) + [""]
    with pytest.raises(ValueError, match=message):
        TASKS["classify"].open(table(text=texts, label=labels))


def test_an_unknown_label() -> None:
    task, _ = open_task("classify")
    dev = Table.of("dev.csv", text=["x", "y"], label=["pos", "Neg"])
    message = "^dev.csv, row 2: unknown label: got 'Neg', expected 'neg', 'pos'$"
    with pytest.raises(ValueError, match=message):
        task.check(dev, BadRows())
    bad = BadRows(skip=True)
    assert len(task.check(dev, bad)) == 1
    assert bad.by_reason == {"unknown label": 1}
    assert len(task.check(dev, BadRows(), labelled=False)) == 2


def test_class_scores_by_hand() -> None:
    """Gold neg pos pos neg, predicted neg pos neg neg."""
    task, rows = open_task("classify")
    features = task.encode(rows, SMALL, max_length=40)
    predictions = task.decode(one_hot([0, 1, 0, 0], 2), features, rows)
    assert [p["label"] for p in predictions] == ["neg", "pos", "neg", "neg"]
    scores = task.scores(predictions, rows)
    found = {name: score.value for name, score in scores.items()}
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["auc"] == pytest.approx(0.75)  # 1 of 2 above both, 1 tied with both
    confidence = 1 / (1 + np.exp(-9))
    assert found["calibration_error"] == pytest.approx(confidence - 0.75)
    outcomes = task.outcomes(predictions, rows)
    assert outcomes is not None
    assert outcomes.names == ("neg", "pos")
    assert outcomes.gold.tolist() == [0, 1, 1, 0]
    assert outcomes.predicted.tolist() == [0, 1, 0, 0]


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["four", "nanometre", "inf", -float("inf"), "1e39", True, [1.0]])
def test_what_is_no_number(value: Any) -> None:
    task, rows = open_task("regress")
    wrong = Table.of("dev.csv", text=TEXTS, label=[*rows.columns["label"][:3], value])
    with pytest.raises(ValueError, match="^dev.csv, row 4: label is not a number: got "):
        task.check(wrong, BadRows())


def test_numbers() -> None:
    task, rows = open_task("regress")
    assert task.config() == {"num_labels": 1, "problem_type": "regression"}
    features = task.encode(rows, SMALL, max_length=40)
    labels = task.collate([features[i] for i in range(4)])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == pytest.approx([1.5, 2, 4.25, -1e-3])
    outputs = [np.array([x], np.float32) for x in (3, 4, 8.5, 0)]
    scores = task.scores(task.decode(outputs, features, rows), rows)
    assert scores["pearson"].value == pytest.approx(1, abs=1e-6)
    assert scores["spearman"].value == 1
    with pytest.raises(ValueError, match="label: all rows have 3, expected two numbers or more"):
        TASKS["regress"].open(table(text=["x", "y"], label=["3", "3.0"]))
    with pytest.raises(ValueError, match="label: no row has a number"):
        TASKS["regress"].open(table(text=["x"], label=["three"]))


def test_when_labels_of_pairs_are_classes() -> None:
    assert are_classes(["0", "1", "1"]) and are_classes(["yes", "no"]) and are_classes([1, 2.0])
    assert not are_classes(["0.5", "1"]) and not are_classes(range(30))
    pairs = TASKS["pairs"]
    assert open_task("pairs on a scale")[0].config()["problem_type"] == "regression"
    rows = table(text=["x", "y"], text_pair=["x", "y"], label=["1", "5"])
    assert pairs.open(rows).config()["num_labels"] == 2
    assert pairs.open(rows, regression=True).config()["num_labels"] == 1


# --- sets of labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        ["a|b", "", "b", "c"],
        ["a, b", "", "b", "c"],
        [["a", "b"], [], ["b"], ("c",)],
        ['["a", "b"]', "[]", "b", "c"],
        [
            {"a": "1", "b": 1, "c": 0},
            {"a": 0.0, "b": "0", "c": False},
            {"a": "0", "b": "1", "c": "0"},
            {"a": 0, "b": 0, "c": True},
        ],
    ],
)
def test_sets_of_labels(values: list[Any]) -> None:
    rows = table(text=TEXTS, labels=values)
    task = TASKS["multilabel"].open(rows)
    assert task.config()["problem_type"] == "multi_label_classification"
    assert task.config()["id2label"] == {0: "a", 1: "b", 2: "c"}
    features = task.encode(task.check(rows, BadRows()), SMALL, max_length=40)
    labels = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert features.per_feature["labels"].tolist() == labels
    outputs = [4 * np.array(x, np.float32) - 2 for x in labels]
    predictions = task.decode(outputs, features, rows)
    assert [p["labels"] for p in predictions] == [["a", "b"], [], ["b"], ["c"]]
    assert predictions[0]["probabilities"]["c"] == pytest.approx(1 / (1 + np.exp(2)))
    assert task.scores(predictions, rows)["exact_match"].value == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a", "d"], "unknown label: got 'd', expected 'a', 'b', 'c'"),
        (["a", "a"], "a label twice"),
        (7, "no list of labels: got 7"),
        (["a", None], "no list of labels"),
        ("[a, b", "no list of labels"),
        ({"a": "1", "b": "2", "c": "0"}, "no list of labels"),
    ],
)
def test_bad_sets(value: Any, reason: str) -> None:
    task, _ = open_task("multilabel")
    with pytest.raises(ValueError, match=f"^dev.csv, row 1: {reason}"):
        task.check(Table.of("dev.csv", text=["x"], labels=[value]), BadRows())


def test_no_labels_at_all() -> None:
    with pytest.raises(ValueError, match="labels: no row has one"):
        TASKS["multilabel"].open(table(text=["x", "y"], labels=["", None]))


# --- checkpoints that were fine-tuned elsewhere -----------------------------------------------


@pytest.mark.parametrize(
    ("task", "fields", "expected"),
    [
        ("classify", {"num_labels": 3}, {"kind": "classes", "names": ["0", "1", "2"]}),
        ("classify", {"id2label": {0: "n", 1: "p"}}, {"kind": "classes", "names": ["n", "p"]}),
        ("pairs", {"num_labels": 2}, {"kind": "classes", "names": ["0", "1"]}),
        ("pairs", {"num_labels": 1}, {"kind": "number"}),
        ("regress", {"num_labels": 1}, {"kind": "number"}),
        (
            "multilabel",
            {"id2label": {0: "n", 1: "p"}},
            {"kind": "label_sets", "names": ["n", "p"], "threshold": 0.5},
        ),
    ],
)
def test_from_config(task: str, fields: dict, expected: dict) -> None:
    assert TASKS[task].from_config(BertConfig(**fields)).state()["target"] == expected
