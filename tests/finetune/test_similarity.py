"""Sentence vectors: both losses against their definition, and a model that sentence-transformers
reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.finetune import SentenceEncoder, Setting, evaluate, finetune, load
from fastbert.finetune.sentence_encoder import cosent_loss, mean_of_tokens, ranking_loss
from fastbert.finetune.table import BadRows, Table
from fastbert.finetune.tasks import TASKS
from fastbert.packed import PackedBatch

from ._samples import make_small_tokenizer


def vectors(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.normalize(x, dim=-1)


def test_mean_of_tokens() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    batch = PackedBatch.from_sequences([[5, 6], [], [7]])
    assert mean_of_tokens(x, batch).tolist() == [[2.0, 3.0], [0.0, 0.0], [10.0, 0.0]]


@pytest.mark.parametrize("groups", [2, 3])
def test_ranking_loss_is_its_definition(groups: int) -> None:
    parts = vectors(groups, 5, 7)
    anchors, positives = parts[0], parts[1]
    candidates = torch.cat(list(parts[1:]))
    total = 0.0
    for i in range(5):
        forwards = [20 * float(anchors[i] @ c) for c in candidates]
        backwards = [20 * float(positives[i] @ a) for a in anchors]
        total += math.log(sum(map(math.exp, forwards))) - forwards[i]
        total += math.log(sum(map(math.exp, backwards))) - backwards[i]
    assert float(ranking_loss(parts)) == pytest.approx(total / 10, rel=1e-12)


def test_equal_texts_are_no_negatives() -> None:
    """Rows 0 and 1 have the same second text; the first text of row 2 is the second of row 3."""
    parts = vectors(2, 4, 7)
    keys = torch.tensor([[1, 2, 3, 4], [5, 5, 6, 3]])
    total = 0.0
    for i in range(4):
        forwards = {j: 20 * float(parts[0, i] @ parts[1, j]) for j in range(4)}
        backwards = {j: 20 * float(parts[1, i] @ parts[0, j]) for j in range(4)}
        forwards = {
            j: x
            for j, x in forwards.items()
            if j == i or keys[1, j] not in (keys[1, i], keys[0, i])
        }
        backwards = {
            j: x
            for j, x in backwards.items()
            if j == i or keys[0, j] not in (keys[0, i], keys[1, i])
        }
        assert len(forwards) == (3 if i < 3 else 4) and len(backwards) == (3 if i == 3 else 4)
        total += math.log(sum(map(math.exp, forwards.values()))) - forwards[i]
        total += math.log(sum(map(math.exp, backwards.values()))) - backwards[i]
    assert float(ranking_loss(parts, keys)) == pytest.approx(total / 8, rel=1e-12)


def test_cosent_loss_is_its_definition() -> None:
    cosines = torch.tensor([0.9, 0.1, 0.5, -0.3], dtype=torch.float64)
    labels = torch.tensor([1.0, 2.0, 5.0, 1.0], dtype=torch.float64)
    total = 1.0
    for i in range(4):
        for j in range(4):
            if labels[i] > labels[j]:
                total += math.exp(20 * float(cosines[j] - cosines[i]))
    assert float(cosent_loss(cosines, labels)) == pytest.approx(math.log(total), rel=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_losses_have_gradients(scaled: bool) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        parts = F.normalize(x, dim=-1)
        if scaled:
            return cosent_loss((parts[0] * parts[1]).sum(1), torch.tensor([0.0, 1.0, 0.5]))
        return ranking_loss(parts, torch.tensor([[1, 2, 3], [4, 4, 5]]))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x,))


def test_features_are_both_texts_of_a_row() -> None:
    table = Table.of(text=["the cat", "a dog sat on the mat"], text_pair=["cat", "the dog"])
    task = TASKS["similarity"].open(table)
    features = task.encode(table, make_small_tokenizer(), max_length=6)
    assert features.lengths.tolist() == [4 + 3, 6 + 4] and features.truncated == 1
    inputs = task.collate([features[0], features[1]])
    # All first texts, then all second ones.
    assert inputs["batch"].lengths == (4, 6, 3, 4) and inputs["groups"] == 2
    assert inputs["keys"].shape == (4,) and len(set(inputs["keys"].tolist())) == 4


def test_ranks_do_not_count_equal_texts() -> None:
    table = Table.of(text=["a", "the", "cat"], text_pair=["dog", "Dog", "mat"])
    task = TASKS["similarity"].open(table)
    features = task.encode(table, make_small_tokenizer(), max_length=8)
    first = np.eye(3, dtype=np.float32)
    second = np.array([[0.8, 0.6, 0], [1, 0, 0], [0.9, 0, 0.4]], np.float32)
    outputs = list(np.stack([first, second], 1))
    found = task.decode(outputs, features, table)
    # Row 0 is beaten by row 2; row 1 would be by row 0, whose second text is the same.
    assert [row["rank"] for row in found] == [2, 1, 1]
    scores = task.scores(found, table)
    assert scores["mrr"].value == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["first"].value == pytest.approx(2 / 3)


def test_pairs_without_a_score_may_be_tried_on_pairs_with_one() -> None:
    task = TASKS["similarity"].open(Table.of(text=["a", "b"], text_pair=["c", "d"]))
    table = Table.of(text=["a", "b", "c"], text_pair=["d", "e", "f"], label=[1, 0, 1])
    found = [{"value": 0.9, "rank": 1}, {"value": 0.8, "rank": 3}, {"value": 0.1, "rank": 2}]
    scores = {name: score.value for name, score in task.scores(found, table).items()}
    assert scores["mrr"] == (1 + 1 / 2) / 2 and scores["first"] == 1 / 2
    assert scores["auc"] == 1 / 2
    assert set(scores) == {"mrr", "first", "auc", "spearman", "pearson"}


def test_bad_rows() -> None:
    table = Table.of("p.csv", text=["a", " "], text_pair=["b", "c"], label=[1, 2])
    task = TASKS["similarity"].open(table)
    with pytest.raises(ValueError, match=r"p\.csv, row 2: empty text"):
        task.check(table, BadRows())
    table = Table.of("p.csv", text=["a", "b"], text_pair=["b", "c"], label=[1, "much"])
    with pytest.raises(ValueError, match=r"p\.csv, row 2: label is not a number"):
        task.check(table, BadRows())


def pairs(rows: int, seed: int, scored: bool) -> Table:
    """Pairs about one of several things, said in other words."""
    random = np.random.default_rng(seed)
    things = ("cat", "dog", "film", "york", "mat", "cafe")
    around = ("the", "a", "new", "was", "in", "on", "of", "is", "when")

    def text(thing: str) -> str:
        return " ".join([*random.choice(around, 3), thing, *random.choice(around, 2)])

    columns: dict[str, list[Any]] = {"text": [], "text_pair": [], "label": []}
    for _ in range(rows):
        first = str(random.choice(things))
        same = not scored or random.random() < 0.5
        second = first if same else str(random.choice(things))
        columns["text"].append(text(first))
        columns["text_pair"].append(text(second))
        columns["label"].append(float(first == second))
    if not scored:
        columns.pop("label")
    return Table.of("pairs", **columns)


@pytest.mark.parametrize("scored", [False, True])
def test_training_brings_pairs_together(checkpoint: Path, tmp_path: Path, scored: bool) -> None:
    train, dev = pairs(200, 1, scored), pairs(60, 2, scored=True)
    start = SentenceEncoder.from_pretrained(checkpoint)
    start.save_pretrained(tmp_path / "start")
    fastbert.BertForMaskedLM.from_pretrained(checkpoint)
    results = finetune(
        checkpoint, train, tmp_path / "out", task="similarity",
        dev=dev if scored else pairs(60, 3, scored=False),
        setting=Setting(epochs=6, learning_rate=3e-3, batch=16, dropout=0.0),
    )  # fmt: skip
    folder = tmp_path / "out" / "model"
    trained = load(folder)
    if scored:
        assert results["dev"]["auc"].keys() == {"value", "low", "high"}
        assert results["dev"]["auc"]["value"] > 0.9
    else:
        # Six things in sixty rows: by chance 1/60.
        assert results["dev"]["mrr"]["value"] > 0.2
    again = evaluate(trained, folder, dev if scored else pairs(60, 3, scored=False))
    assert again.score == pytest.approx(results["dev"][results["selects"]]["value"], abs=1e-6)


def test_sentence_transformers_gives_the_same_vectors(checkpoint: Path, tmp_path: Path) -> None:
    import sentence_transformers

    finetune(
        checkpoint, pairs(32, 1, True), tmp_path / "out", task="similarity",
        setting=Setting(epochs=1, learning_rate=1e-3, max_length=16),
    )  # fmt: skip
    folder = tmp_path / "out" / "model"
    texts = ["the cat sat on the mat", "a dog", "new york is a city !"]
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert peer.max_seq_length == 16  # where training cut texts
    theirs = peer.encode(texts)
    tokenizer = make_small_tokenizer()
    batch = PackedBatch.from_sequences([tokenizer.encode(text).ids for text in texts])
    with torch.no_grad():
        ours = load(folder)(batch=batch).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # And so does an int8 model of it, through the same evaluation.
    fastbert.quantize(load(folder).bert).save_pretrained(tmp_path / "int8")
    rows = pairs(40, 5, True)
    exact = evaluate(load(folder), folder, rows)
    rough = evaluate(fastbert.load(tmp_path / "int8"), folder, rows)
    cosines = [np.array([p["value"] for p in found.predictions]) for found in (exact, rough)]
    np.testing.assert_allclose(*cosines, atol=0.05)
    assert not np.array_equal(*cosines)
