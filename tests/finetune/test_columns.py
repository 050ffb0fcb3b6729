"""Columns are guessed by name, then by content; what is ambiguous or missing is said."""

from __future__ import annotations

import pytest

from fastbert.finetune.columns import ROLES, as_roles, guess_columns
from fastbert.finetune.table import Table
from fastbert.finetune.tasks import TASKS

LONG = ["What is the capital of France ?", "Who was Galileo ?"]


def table(**columns: list) -> Table:
    return Table.of("train.csv", **columns)


def test_every_task_has_roles() -> None:
    assert ROLES.keys() == TASKS.keys()


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("classify", ["label", "text"], {"text": "text", "label": "label"}),
        ("classify", ["Review Text", "Class"], {"text": "Review Text", "label": "Class"}),
        ("classify", ["text", "label", "label_text"], {"text": "text", "label": "label"}),
        ("classify", ["idx", "sentence", "label"], {"text": "sentence", "label": "label"}),
        ("regress", ["essay_id", "text", "score"], {"text": "text", "label": "score"}),
        (
            "pairs",
            ["id", "premise", "hypothesis", "label"],
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        (
            "pairs",
            ["question", "sentence", "label"],
            {"text": "question", "text_pair": "sentence", "label": "label"},
        ),
        ("multilabel", ["text", "genres"], {"text": "text", "labels": "genres"}),
        ("tag", ["tokens", "pos_tags", "ner_tags"], {"tokens": "tokens", "tags": "ner_tags"}),
        ("tag", ["tokens", "lemma", "upos", "xpos"], {"tokens": "tokens", "tags": "upos"}),
        (
            "qa",
            ["id", "title", "question", "context", "answers"],
            {"question": "question", "context": "context", "answers": "answers"},
        ),
        (
            "qa",
            ["question", "context", "answer", "answer_start"],
            {
                "question": "question",
                "context": "context",
                "answers": "answer",
                "answer_start": "answer_start",
            },
        ),
        (
            "choice",
            ["sent1", "sent2", "ending0", "ending1", "label"],
            {
                "text": "sent1",
                "question": "sent2",
                "choices": ("ending0", "ending1"),
                "label": "label",
            },
        ),
        (
            "choice",
            ["article", "question", "options", "answer"],
            {"text": "article", "question": "question", "choices": "options", "label": "answer"},
        ),
        ("similarity", ["anchor", "positive"], {"text": "anchor", "text_pair": "positive"}),
    ],
)
def test_by_name(task: str, names: list[str], expected: dict) -> None:
    assert guess_columns(table(**{name: ["x", "y"] for name in names}), task) == expected


def test_by_content() -> None:
    rows = table(id=[1, 2], kind=["a", "b"], what=LONG)
    assert guess_columns(rows, "classify") == {"text": "what", "label": "kind"}
    rows = table(column1=LONG, column2=["LOC", "HUM"])
    assert guess_columns(rows, "classify") == {"text": "column1", "label": "column2"}
    rows = table(**{"Unnamed: 0": ["0", "1"], "kind": ["LOC", "HUM"], "what": LONG})
    assert guess_columns(rows, "classify") == {"text": "what", "label": "kind"}
    rows = table(a=LONG, b=["The longest of all columns"] * 2, c=["3.5", "1"], d=["x", "y"])
    expected = {"text": "b", "label": "c"}
    assert guess_columns(rows, "regress") == expected
    expected = {"text": "b", "text_pair": "a", "label": "c"}
    assert guess_columns(rows, "pairs", {"label": "c"}) == expected


def test_what_is_given_wins() -> None:
    rows = table(text=LONG, other=LONG, label=["a", "b"], fine=["x", "y"])
    assert guess_columns(rows, "classify", {"label": "fine", "text": "other"}) == {
        "text": "other",
        "label": "fine",
    }
    given = {"choices": "label,fine"}
    assert guess_columns(rows, "choice", {**given, "label": "other"})["choices"] == (
        "label",
        "fine",
    )
    given = {"labels": ["label", "fine"]}
    assert guess_columns(rows, "multilabel", given)["labels"] == ("label", "fine")
    commas = table(**{"a,b": LONG, "label": ["a", "b"]})
    assert guess_columns(commas, "classify", {"text": "a,b"})["text"] == "a,b"


def test_without_labels() -> None:
    assert guess_columns(table(text=LONG), "classify", labelled=False) == {"text": "text"}
    rows = table(question=LONG, context=LONG)
    assert guess_columns(rows, "qa", labelled=False) == {
        "question": "question",
        "context": "context",
    }


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("classify", {}, "'label' may be label-coarse or label-fine; expected to be told which"),
        ("classify", {"label": "nothing"}, "no column 'nothing' for 'label'; its columns are id,"),
        ("classify", {"label": "label_fine"}, r"\(is 'label-fine' meant\?\)"),
        ("classify", {"tags": "id"}, "got the role 'tags', expected one of text, label"),
        ("qa", {}, "no column for 'context', which qa needs, expected one called context or"),
        ("tag", {}, "no column for 'tokens'|no column for 'tags'"),
        ("nothing", {}, "task: got 'nothing', expected one of classify"),
    ],
)
def test_errors_name_the_columns(task: str, given: dict, message: str) -> None:
    columns = {"id": [1, 2], "label-coarse": ["a", "b"], "label-fine": ["x", "y"]}
    with pytest.raises(ValueError, match=message):
        guess_columns(table(**columns, question=LONG), task, given)


def test_two_columns_that_may_be_the_label() -> None:
    rows = table(text=LONG, first=["a", "b"], second=["c", "d"])
    with pytest.raises(ValueError, match="'label' may be first or second; .* text, first, second"):
        guess_columns(rows, "classify")


def test_as_roles() -> None:
    rows = table(a=["x", "y"], b=["0", "1"], c=["1", "1"])
    made = as_roles(rows, {"text": "a", "labels": ("b", "c")})
    assert made.columns == {
        "text": ["x", "y"],
        "labels": [{"b": "0", "c": "1"}, {"b": "1", "c": "1"}],
    }
    assert made.at(1) == "train.csv, row 2"
