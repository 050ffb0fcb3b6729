"""tag: labels on first pieces, one window a word, entities scored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import BertConfig
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS, task_of

from ._samples import make_small_tokenizer, run, table, texts_of

SMALL = make_small_tokenizer()
Tag = TASKS["tag"]
ROWS = table(
    tokens=[["New", "York", "cats"], ["sat"], ["a", "dog", "in", "York"]],
    tags=[["B-LOC", "I-LOC", "O"], ["O"], ["O", "O", "O", "B-LOC"]],
)


def test_labels_stand_on_first_pieces() -> None:
    task = Tag.open(ROWS)
    assert task.config()["id2label"] == {0: "B-LOC", 1: "I-LOC", 2: "O"}
    assert task.selects == "f1"
    features = task.encode(ROWS, SMALL, max_length=20)
    assert texts_of(features, SMALL) == [
        "[CLS] new york cat ##s [SEP]",
        "[CLS] sat [SEP]",
        "[CLS] a dog in york [SEP]",
    ]
    labels = [features[i]["labels"].tolist() for i in range(3)]
    assert labels == [[-100, 0, 1, 2, -100, -100], [-100, 2, -100], [-100, 2, 2, 2, 0, -100]]
    inputs = task.collate([features[0], features[1]])
    assert inputs["labels"].tolist() == labels[0] + labels[1]


def test_words_that_the_tokenizer_drops_or_knows_as_special() -> None:
    words = ["\u200b", "cats", "[SEP]", "New York", "\u200d"]
    rows = table(tokens=[words], tags=[["A", "B", "A", "B", "A"]])
    features = Tag.open(rows).encode(rows, SMALL, max_length=20)
    assert texts_of(features, SMALL) == ["[CLS] [UNK] cat ##s [SEP] new york [UNK] [SEP]"]
    assert features[0]["labels"].tolist() == [-100, 0, 1, -100, 0, 1, -100, 0, -100]


@given(st.lists(st.sampled_from(["cat", "cats", "unably", "."]), min_size=1, max_size=25),
       st.integers(4, 12), st.integers(0, 7))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_every_word_has_its_tag_once(words: list[str], max_length: int, stride: int) -> None:
    """And, in the window that it has it in, as many neighbours as in any other."""
    stride = min(stride, max_length - 3)
    names = ["cat", "cats", "unably", "."]
    rows = table(tokens=[words, words[::-1]], tags=[words, words[::-1]])
    task = Tag.from_state({"names": names})
    features = task.encode(rows, SMALL, max_length=max_length, stride=stride)
    outputs = []
    for i in range(len(features)):
        labels, word = features[i]["labels"], features.note("word", i)
        assert ((labels >= 0) == (word >= 0)).all()
        outputs.append(np.eye(len(names), dtype=np.float32)[np.maximum(labels, 0)])
    assert (features.per_token["labels"] >= 0).sum() == 2 * len(words)
    predictions = task.decode(outputs, features, rows)
    assert [p["tags"] for p in predictions] == [words, words[::-1]]

    pieces = [len(SMALL.encode(word, add_special_tokens=False)) for word in words]
    places = np.cumsum(pieces) - pieces  # of first pieces among those of the first row
    step, room = max_length - 2 - stride, max_length - 2
    count = int((features.row == 0).sum())

    def margin(window: int, piece: int) -> float:
        place = piece - window * step
        left = np.inf if window == 0 else place
        right = np.inf if window == count - 1 else room - 1 - place
        return min(left, right) if 0 <= place < room else -1

    for number, piece in enumerate(places):
        (chosen,) = [i for i in range(count) if number in features.note("word", i)]
        assert margin(chosen, piece) == max(margin(i, piece) for i in range(count))


def test_from_rows_to_scores(one_thread: None) -> None:
    task = Tag.open(ROWS)
    for max_length in (20, 5):
        features = task.encode(task.check(ROWS, BadRows()), SMALL, max_length=max_length, stride=1)
        predictions = task.decode(run(task, features), features, ROWS)
        assert [len(p["tags"]) for p in predictions] == [3, 1, 4]
        json.dumps(predictions)
        assert task.scores(predictions, ROWS).keys() == {"accuracy", "f1", "precision", "recall"}
    bare = table(tokens=ROWS.columns["tokens"])
    features = task.encode(
        task.check(bare, BadRows(), labelled=False), SMALL, max_length=5, stride=1, labelled=False
    )
    assert "labels" not in features[0]
    assert task.decode(run(task, features), features, bare) == predictions


def test_scores_by_hand() -> None:
    """Of 2 entities 1 is found; 1 of the 3 that are predicted is none, and 1 is too short."""
    task = Tag.open(ROWS)
    predictions = [
        {"tags": ["B-LOC", "O", "O"], "probabilities": [0.9, 0.8, 0.7]},
        {"tags": ["I-LOC"], "probabilities": [0.6]},
        {"tags": ["O", "O", "O", "B-LOC"], "probabilities": [0.5] * 4},
    ]
    found = {name: score.value for name, score in task.scores(predictions, ROWS).items()}
    assert found["accuracy"] == 6 / 8
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == 1 / 2
    assert found["f1"] == pytest.approx(2 / 5)
    outcomes = task.outcomes(predictions, ROWS)
    assert outcomes is not None
    assert outcomes.gold.tolist() == [0, 1, 2, 2, 2, 2, 2, 0]
    assert outcomes.predicted.tolist() == [0, 2, 2, 1, 2, 2, 2, 0]
    assert outcomes.confidence.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5]


def test_tags_that_mark_no_entities() -> None:
    rows = table(tokens=["the cat sat", "a dog"], tags=["DET NOUN VERB", "DET NOUN"])
    task = Tag.open(rows)
    assert task.selects == "accuracy"
    predictions = [
        {"tags": ["DET", "NOUN", "NOUN"], "probabilities": [1.0] * 3},
        {"tags": ["DET", "NOUN"], "probabilities": [1.0] * 2},
    ]
    scores = task.scores(predictions, rows)
    assert scores.keys() == {"accuracy"}
    assert scores["accuracy"].value == 0.8


@pytest.mark.parametrize(
    ("tokens", "tags", "reason"),
    [
        (["a", "b"], ["O"], "misaligned tags: got 1 tags for 2 words"),
        (["a"], ["O", "O"], "misaligned tags: got 2 tags for 1 words"),
        ("a b", "O O O", "misaligned tags: got 3 tags for 2 words"),
        (["a"], ["B-PER"], "unknown tag: got 'B-PER', expected 'B-LOC', 'I-LOC', 'O'"),
        (["a"], [None], r"no tags: got \[None\]"),
        (["a"], None, "no tags: got None"),
        (["a"], 3, "no tags: got 3"),
        ([], [], r"no tokens: got \[\]"),
        (None, ["O"], "no tokens: got None"),
        (float("nan"), ["O"], "no tokens: got nan"),
        (7, ["O"], "no tokens: got 7, expected a list of words"),
        (["a", 7], ["O", "O"], "a token is not a text: got 7"),
        (["a", "\ud800"], ["O", "O"], "a token is not Unicode: .*"),
        (["a", " "], ["O", "O"], "an empty token: got ' ' among 2 tokens"),
    ],
)
def test_bad_rows(tokens: Any, tags: Any, reason: str) -> None:
    task = Tag.open(ROWS)
    wrong = Table.of("dev.conll", tokens=[["a"], tokens], tags=[["O"], tags])
    with pytest.raises(ValueError, match=f"^dev.conll, row 2: {reason}$"):
        task.check(wrong, BadRows())
    bad = BadRows(skip=True)
    assert len(task.check(wrong, bad)) == bad.count == 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [([["O"]], "tags: all words have 'O', expected two tags or more"), ([None], "no word has one")],
)
def test_nothing_to_learn(tags: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tag.open(table(tokens=[["a"]], tags=tags))


def test_state_and_config() -> None:
    task = Tag.open(ROWS)
    assert task_of(json.loads(json.dumps(task.state()))).state() == task.state()
    foreign = Tag.from_config(BertConfig(id2label={0: "O", 1: "B-X"}))
    assert foreign.state() == {"task": "tag", "names": ["O", "B-X"]}
