"""Sentences that mean the same get vectors that point the same way."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.finetune import metrics
from fastbert.finetune.features import Features, Frame, tokenise, windows
from fastbert.finetune.sentence_encoder import SentenceEncoder
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.base import Task, text_problem
from fastbert.finetune.tasks.targets import Number, Prediction, Problem
from fastbert.packed import PackedBatch

Array = np.ndarray

_TEXTS = ("text", "text_pair")


class Similarity(Task):
    """Vectors for sentences, learnt from pairs: two that mean the same, or two and how alike they
    are (see ``SentenceEncoder``). A text is cut to its first ``max_length`` tokens, and counted.

    scaled: whether the training rows say how alike the two are.
    """

    name, summary = "similarity", "sentence vectors, from pairs with or without a score"
    model = SentenceEncoder

    def __init__(self, scaled: bool) -> None:
        self.scaled = scaled

    @property
    def selects(self) -> str:
        return "spearman" if self.scaled else "mrr"

    @classmethod
    def open(cls, table: Table) -> Similarity:
        """With a column of labels the pairs are scored, without one all of them mean the same."""
        scaled = "label" in table.columns
        if scaled:
            Number.discover(table, "label")
        elif len(table) < 2:
            raise ValueError(f"{table.name}: got {len(table)} pairs, expected 2 or more")
        return cls(scaled)

    def config(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"task": self.name, "scaled": self.scaled}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Similarity:
        return cls(state["scaled"])

    @classmethod
    def from_config(cls, config: BertConfig) -> Similarity:
        return cls(scaled=True)

    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        for role in _TEXTS:
            problem = text_problem(table.columns[role][row], role)
            if problem is not None:
                return problem
        if labelled and "label" in table.columns:
            return Number().problem(table.columns["label"][row])
        return None

    def encode(
        self,
        table: Table,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        stride: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """A feature is a row: the tokens of its first text, then those of its second."""
        frame = Frame.of(tokenizer, pair=False)
        parts, keys, cut = [], [], np.zeros(len(table), bool)
        for role in _TEXTS:
            texts = table.columns[role]
            keys.append(np.array([zlib.crc32(text.strip().lower().encode()) for text in texts]))
            made = windows(tokenise(texts, tokenizer), None, frame, max_length, 0)
            firsts = np.unique(made.row, return_index=True)[1]
            cut |= np.bincount(made.row, minlength=len(table)) > 1
            ends = np.cumsum(made.lengths)
            parts.append(
                [made.input_ids[ends[i] - made.lengths[i] : ends[i]] for i in firsts.tolist()]
            )
        sizes = np.array([[len(a), len(b)] for a, b in zip(*parts, strict=True)], np.int64)
        ids = np.concatenate([ids for pair in zip(*parts, strict=True) for ids in pair])
        per_feature = {"sizes": sizes, "keys": np.stack(keys, 1).astype(np.int64)}
        if labelled and self.scaled:
            per_feature["labels"] = Number().array(table.columns["label"])
        rows = np.arange(len(table))
        return Features(
            sizes.sum(1), rows, {"input_ids": ids}, per_feature, truncated=int(cut.sum())
        )

    def collate(self, examples: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
        pieces = [np.split(e["input_ids"], [e["sizes"][0]]) for e in examples]
        flat = [ids for group in zip(*pieces, strict=True) for ids in group]
        batch = PackedBatch.from_flat(
            torch.from_numpy(np.concatenate(flat).astype(np.int64)), [len(ids) for ids in flat]
        )
        keys = np.stack([e["keys"] for e in examples], 1).ravel()
        inputs: dict[str, Any] = {"batch": batch, "groups": 2, "keys": torch.from_numpy(keys)}
        if "labels" in examples[0]:
            inputs["labels"] = torch.from_numpy(np.stack([e["labels"] for e in examples]))
        return inputs

    def split(self, output: Any, inputs: Mapping[str, Any]) -> list[Array]:
        """(2, H) for each row."""
        vectors = output.logits.detach().float().cpu().numpy()
        return list(vectors.reshape(2, -1, vectors.shape[1]).swapaxes(0, 1))

    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        """The cosine of each row's texts and, where rows are not scored, the place of the second
        text among those of all rows, by cosine with the first: 1 is best. Equal texts do not
        compete."""
        both = np.stack(outputs)
        first, second = both[:, 0], both[:, 1]
        cosines = np.einsum("nh,nh->n", first, second)
        found: list[Prediction] = [{"value": value} for value in cosines.tolist()]
        if self.scaled:
            return found
        keys = features.per_feature["keys"]
        for begin in range(0, len(first), _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            better = first[rows] @ second.T > cosines[rows, None]
            better &= keys[None, :, 1] != keys[rows, None, 1]
            better &= keys[None, :, 1] != keys[rows, None, 0]
            for one, count in zip(found[rows], better.sum(1).tolist(), strict=True):
                one["rank"] = 1 + count
        return found

    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, metrics.Score]:
        """Of rows with labels, the Spearman and Pearson correlation of cosines and labels and,
        where these are but 0 and 1, the ROC-AUC. Where training rows have none, the mean reciprocal
        rank too, and how often the right text comes first: of all rows or, with labels, of those
        with the highest."""
        cosines = np.array([p["value"] for p in predictions])
        measures: list[metrics.Measure] = []
        right = np.ones(len(cosines), bool)
        if "label" in table.columns:
            labels = Number().array(table.columns["label"]).astype(np.float64)
            measures.append(_correlations(metrics.regression(labels, cosines)))
            if set(labels.tolist()) == {0.0, 1.0}:
                measures.append(metrics.roc_auc(labels, cosines))
            right = labels == labels.max()
        if not self.scaled:
            ranks = np.array([p["rank"] for p in predictions])
            measures.append(
                metrics.ratios(mrr=(right / ranks, right), first=(right & (ranks == 1), right))
            )
        return metrics.scored(measures, len(cosines))


def _correlations(measure: metrics.Measure) -> metrics.Measure:
    """Without the squared error: cosines are in a unit of their own."""
    return lambda weights: {k: x for k, x in measure(weights).items() if k != "mse"}


_BLOCK = 1024  # rows whose cosines with all others are held at a time
