"""A tag for each word of a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.data.tokenizer import special_ids
from fastbert.finetune import metrics
from fastbert.finetune.entities import entities, has_entities
from fastbert.finetune.features import Features, Frame, Ragged, Windows, tokenise_words, windows
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.base import Task, unicode_problem
from fastbert.finetune.tasks.targets import (
    Classes,
    Outcomes,
    Prediction,
    Problem,
    class_name,
    in_order,
    is_missing,
    label_config,
    listed,
    softmax,
)
from fastbert.models import BertForTokenClassification
from fastbert.nn.heads import IGNORED

Array = np.ndarray


class Tag(Task):
    """A tag for each word, read off its first piece (Devlin et al., arXiv 1810.04805, section 5.3).

    ``tokens`` are words in a list, or in a text with blanks between them; so are ``tags``.

    Long sentences become windows. Each word has its tag in one of them only, in training as in
    evaluation: in the one where the fewer of the tokens before and behind it are the most.
    """

    name, summary = "tag", "a tag for each word of a sentence"
    model = BertForTokenClassification
    per_token = frozenset({"labels"})

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._numbers = {name: i for i, name in enumerate(names)}

    @property
    def selects(self) -> str:
        return "f1" if has_entities(self.names) else "accuracy"

    @classmethod
    def open(cls, table: Table) -> Tag:
        columns = zip(table.columns["tokens"], table.columns["tags"], strict=True)
        sure = [_tags(tags) for words, tags in columns if _words_problem(words) is None]
        found = {tag for tags in sure for tag in tags or ()}
        if len(found) < 2:
            held = f"all words have {next(iter(found))!r}" if found else "no word has one"
            raise ValueError(f"{table.name}: tags: {held}, expected two tags or more")
        return cls(in_order(found))

    def config(self) -> dict[str, Any]:
        return {**label_config(self.names), "problem_type": None}

    def state(self) -> dict[str, Any]:
        return {"task": self.name, "names": list(self.names)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tag:
        return cls(state["names"])

    @classmethod
    def from_config(cls, config: BertConfig) -> Tag:
        return cls(Classes.of_config(config).names)

    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        words = table.columns["tokens"][row]
        problem = _words_problem(words)
        if problem is not None or not labelled:
            return problem
        value = table.columns["tags"][row]
        tags = _tags(value)
        if tags is None:
            return "no tags", f"got {value!r}"
        count = len(_words(words))
        if len(tags) != count:
            return "misaligned tags", f"got {len(tags)} tags for {count} words"
        unknown = [tag for tag in tags if tag not in self._numbers]
        if unknown:
            return "unknown tag", f"got {unknown[0]!r}, expected {listed(self.names)}"
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
        sentences = [_words(value) for value in table.columns["tokens"]]
        words = Ragged.of([range(len(one)) for one in sentences])  # their numbers in the row
        pieces = _pieces(list(chain.from_iterable(sentences)), tokenizer)
        owner = np.repeat(np.arange(len(sentences)), words.lengths)
        lengths = np.bincount(owner, pieces.lengths, len(sentences)).astype(np.int64)
        made = windows(
            Ragged.joined(pieces.values, lengths),
            None,
            Frame.of(tokenizer, pair=False),
            max_length,
            stride,
        )
        first = np.full(len(pieces.values), -1)  # of each piece: the number, among all, of its word
        first[pieces.starts] = np.arange(len(pieces.starts))
        word = _in_best_window(made, first)
        chosen = word >= 0
        per_token = {"input_ids": made.input_ids, "token_type_ids": made.token_type_ids}
        if labelled:
            tags = chain.from_iterable(_tags(value) or () for value in table.columns["tags"])
            numbers = np.fromiter((self._numbers[tag] for tag in tags), np.int64, len(words.values))
            per_token["labels"] = np.full(len(word), IGNORED)
            per_token["labels"][chosen] = numbers[word[chosen]]
        word[chosen] = words.values[word[chosen]]
        return Features(made.lengths, made.row, per_token, {}, notes={"word": word})

    def split(self, output: Any, inputs: Mapping[str, Any]) -> list[Array]:
        """(n, C) logits of the tokens of each example."""
        logits = output.logits.detach().float().cpu().numpy()
        return np.split(logits, np.cumsum(inputs["batch"].lengths)[:-1])

    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        predictions: list[Prediction] = []
        for value in table.columns["tokens"]:
            count = len(_words(value))
            predictions.append({"tags": [""] * count, "probabilities": [0.0] * count})
        for i, logits in enumerate(outputs):
            word = features.note("word", i)
            probabilities = softmax(logits[word >= 0])
            found = probabilities.argmax(1).tolist(), probabilities.max(1).tolist()
            prediction = predictions[features.row[i]]
            for place, tag, probability in zip(word[word >= 0].tolist(), *found, strict=True):
                prediction["tags"][place] = self.names[tag]
                prediction["probabilities"][place] = probability
        return predictions

    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, metrics.Score]:
        """accuracy over words and, where tags mark entities, their precision, recall and f1, all
        with the sentences as the bootstrap's rows."""
        gold = [_tags(value) or [] for value in table.columns["tags"]]
        predicted = [prediction["tags"] for prediction in predictions]
        right = [sum(map(str.__eq__, g, p)) for g, p in zip(gold, predicted, strict=True)]
        words = np.array([len(tags) for tags in gold])
        measures = [metrics.ratios(accuracy=(np.array(right), words))]
        if has_entities(self.names):
            of_gold, of_predicted = (list(map(entities, tags)) for tags in (gold, predicted))
            common = map(len, map(set.intersection, of_gold, of_predicted))
            hits = np.fromiter(common, np.int64, len(gold))
            there, said = (np.array([len(e) for e in one]) for one in (of_gold, of_predicted))
            measures.append(
                metrics.ratios(
                    f1=(2 * hits, there + said), precision=(hits, said), recall=(hits, there)
                )
            )
        return metrics.scored(measures, len(gold))

    def outcomes(self, predictions: Sequence[Prediction], table: Table) -> Outcomes:
        gold = chain.from_iterable(_tags(value) or () for value in table.columns["tags"])
        predicted = chain.from_iterable(one["tags"] for one in predictions)
        confidence = chain.from_iterable(one["probabilities"] for one in predictions)
        return Outcomes(
            self.names,
            np.array([self._numbers[tag] for tag in gold]),
            np.array([self._numbers[tag] for tag in predicted]),
            np.array(list(confidence)),
        )


# --- words and tags ---------------------------------------------------------------------------


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else value


def _words_problem(value: Any) -> Problem | None:
    if is_missing(value):
        return "no tokens", f"got {value!r}"
    if not isinstance(value, str | list | tuple):
        return "no tokens", f"got {value!r}, expected a list of words"
    words = _words(value)
    if not words:
        return "no tokens", f"got {value!r}"
    for word in words:
        if not isinstance(word, str):
            return "a token is not a text", f"got {word!r}"
        if not word.strip():
            return "an empty token", f"got {word!r} among {len(words)} tokens"
    return unicode_problem(" ".join(words), "a token")


def _tags(value: Any) -> list[str] | None:
    """The tags of a sentence; None for what is none, or holds what is none."""
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple):
        return None
    tags = [class_name(tag) for tag in value]
    return None if None in tags else [str(tag) for tag in tags]


# --- pieces and windows -----------------------------------------------------------------------


def _pieces(words: Sequence[str], tokenizer: Tokenizer) -> Ragged:
    """The tokens of each word: one that the tokenizer drops as a whole, a joiner of zero width say,
    is [UNK], so that every word has a first piece."""
    made = tokenise_words(words, tokenizer)
    dropped = made.lengths == 0
    values = np.insert(made.values, made.starts[dropped], special_ids(tokenizer).unk)
    return Ragged.joined(values, np.maximum(made.lengths, 1))


def _in_best_window(made: Windows, first: Array) -> Array:
    """(T,): ``first`` of each token where its window is the best for it, and -1 elsewhere.

    first: (P,) for each piece of all rows, -1 or a number.
    The best is where the fewer of the tokens on either side are the most, the first of equal ones;
    there is no better side than the end of the sentence.
    """
    piece = made.of_text(np.arange(len(first)), -1)
    window = np.repeat(np.arange(len(made.lengths)), made.lengths)
    place = np.arange(len(piece)) - np.repeat(np.cumsum(made.lengths) - made.lengths, made.lengths)
    left, right = place, made.lengths[window] - 1 - place
    begins = np.diff(made.row, prepend=-1) != 0  # windows with the row's first token
    ends = np.diff(made.row, append=-1) != 0
    longest = int(made.lengths.max(initial=0))
    left = np.where(begins[window], longest, left)
    right = np.where(ends[window], longest, right)
    margin = np.minimum(left, right)
    tokens = np.flatnonzero(piece >= 0)
    order = tokens[np.lexsort((tokens, -margin[tokens], piece[tokens]))]
    best = order[np.diff(piece[order], prepend=-1) != 0]
    out = np.full(len(piece), -1)
    out[best] = first[piece[best]]
    return out
