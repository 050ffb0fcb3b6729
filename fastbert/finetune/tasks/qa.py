"""The answer to a question, where it stands in a context."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fastbert.config import BertConfig
from fastbert.finetune import metrics, spans
from fastbert.finetune.features import (
    Features,
    Frame,
    Ragged,
    tokenise,
    tokenise_with_offsets,
    windows,
)
from fastbert.finetune.table import Table
from fastbert.finetune.tasks.base import Task, text_problem
from fastbert.finetune.tasks.targets import Prediction, Problem, is_missing, label_config
from fastbert.models import BertForQuestionAnswering

Array = np.ndarray


class Answer(NamedTuple):
    """Characters start .. start + len(text) - 1 of the context; start is None where none is given
    and the text stands there once."""

    text: str
    start: int | None

    def place(self, context: str) -> int:
        return context.find(self.text) if self.start is None else self.start


class QuestionAnswering(Task):
    """A span of the context (Devlin et al., arXiv 1810.04805, sections 4.2 and 4.3).

    ``answers`` are SQuAD's: {"text": […], "answer_start": […]}, a list of {"text",
    "answer_start"}, either of them also as JSON, or a text, with ``answer_start`` in a column of
    its own or, where it stands in the context once, without.

    Windows slide over the context. One without the answer, and a question that has none (SQuAD
    2.0), has [CLS] for its span. Where there are several answers the first is learnt. A row whose
    answer is longer than what windows share may be in none of them as a whole: it does not count in
    the loss, and is one of the features' ``truncated``.

    impossible: whether there are questions without an answer: whether none may be predicted.
    max_answer_tokens: the longest answer that is predicted.
    """

    name, summary = "qa", "the span of a context that answers a question"
    model = BertForQuestionAnswering
    selects = "f1"

    def __init__(self, impossible: bool = False, max_answer_tokens: int = 30) -> None:
        self.impossible = impossible
        self.max_answer_tokens = max_answer_tokens

    @classmethod
    def open(cls, table: Table) -> QuestionAnswering:
        found = [_answers(table, row) for row in range(len(table))]
        if not any(found):
            raise ValueError(f"{table.name}: answers: no row has one")
        return cls(impossible=[] in found)

    def config(self) -> dict[str, Any]:
        return {**label_config(("LABEL_0", "LABEL_1")), "problem_type": None}

    def state(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "impossible": self.impossible,
            "max_answer_tokens": self.max_answer_tokens,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> QuestionAnswering:
        return cls(state["impossible"], state["max_answer_tokens"])

    @classmethod
    def from_config(cls, config: BertConfig) -> QuestionAnswering:
        return cls()

    def problem(self, table: Table, row: int, labelled: bool) -> Problem | None:
        context = table.columns["context"][row]
        for role, text in (("question", table.columns["question"][row]), ("context", context)):
            problem = text_problem(text, role)
            if problem is not None:
                return problem
        if not labelled:
            return None
        answers = _answers(table, row)
        if answers is None:
            return "no answers", f"got {_value(table, row)!r}"
        problems = (_answer_problem(answer, context) for answer in answers)
        return next((problem for problem in problems if problem is not None), None)

    def encode(
        self,
        table: Table,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        stride: int | None = None,
        labelled: bool = True,
    ) -> Features:
        questions = tokenise(table.columns["question"], tokenizer)
        # Several questions ask about one context, which is tokenised once.
        texts = table.columns["context"]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct, characters = tokenise_with_offsets(list(number), tokenizer)
        chosen = np.array([number[text] for text in texts])
        contexts = Ragged(distinct.values, distinct.starts[chosen], distinct.lengths[chosen])
        frame = Frame.of(tokenizer, pair=True)
        made = windows(questions, contexts, frame, max_length, stride, sliding="second")
        per_feature = {}
        lost = made.truncated
        if labelled:
            spans_ = _token_spans(table, contexts, characters)
            answer = spans_[made.row]
            inside = (answer[:, 0] >= made.begin) & (answer[:, 1] < made.begin + made.size)
            # An answer that no window holds whole: none of its windows is to learn that [CLS] is
            # it. A position past the end does not count in the loss.
            held = np.bincount(made.row, inside & (answer[:, 0] >= 0), len(table)) > 0
            lost = lost | ((spans_[:, 0] >= 0) & ~held)
            context_at = made.lengths - len(frame.after) - made.size
            for name, token in zip(("start_positions", "end_positions"), answer.T, strict=True):
                elsewhere = np.where((token < 0) | held[made.row], 0, max_length)
                per_feature[name] = np.where(inside, token - made.begin + context_at, elsewhere)
        return Features(
            made.lengths,
            made.row,
            {"input_ids": made.input_ids, "token_type_ids": made.token_type_ids},
            per_feature,
            notes={"characters": made.of_text(characters, -1, before=len(questions.values))},
            truncated=int(lost.sum()),
        )

    def split(self, output: Any, inputs: Mapping[str, Any]) -> list[Array]:
        """(n, 2) start and end logits of the tokens of each example."""
        logits = [
            x.detach().float().cpu().numpy() for x in (output.start_logits, output.end_logits)
        ]
        return np.split(np.stack(logits, 1), np.cumsum(inputs["batch"].lengths)[:-1])

    def decode(
        self, outputs: Sequence[Array], features: Features, table: Table
    ) -> list[Prediction]:
        """{"answer", "start", "end", "score"}: characters start .. end - 1 of the context.

        The best span of all windows. Where a question may have no answer it has none if that of
        [CLS], the least of all windows, is better: "", 0, 0.
        score: the probability of the first token times that of the last, each over all tokens of
        the context, as often as windows hold them, and over [CLS] where it may be the answer.
        """
        of_row: list[list[int]] = [[] for _ in range(len(table))]
        for i, row in enumerate(features.row.tolist()):
            of_row[row].append(i)
        return [
            self._best(context, [(outputs[i], features.note("characters", i)) for i in windows_])
            for context, windows_ in zip(table.columns["context"], of_row, strict=True)
        ]

    def _best(self, context: str, made: Sequence[tuple[Array, Array]]) -> Prediction:
        best, start, end = -np.inf, 0, 0
        logits = []
        for one, characters in made:
            inside = np.flatnonzero(characters[:, 0] >= 0)
            if not len(inside):
                continue
            one, characters = one[inside].astype(np.float64), characters[inside]
            logits.append(one)
            span = spans.best_span(one[:, 0], one[:, 1], self.max_answer_tokens)
            if span.score > best:
                best = span.score
                start, end = int(characters[span.first, 0]), int(characters[span.last, 1])
        if self.impossible or not logits:
            none = min((one[0].astype(np.float64) for one, _ in made), key=lambda x: x.sum())
            logits.append(none[None])
            if none.sum() > best:
                best, start, end = float(none.sum()), 0, 0
        # Accents of their own are none of the tokenizer's characters: the last letter's are lost.
        while 0 < end < len(context) and unicodedata.combining(context[end]):
            end += 1
        total = np.logaddexp.reduce(np.concatenate(logits), axis=0).sum()
        return {
            "answer": context[start:end],
            "start": start,
            "end": end,
            "score": float(np.exp(best - total)),
        }

    def scores(self, predictions: Sequence[Prediction], table: Table) -> dict[str, metrics.Score]:
        """exact_match and f1, the best over a question's answers."""
        pairs = [
            (prediction["answer"], [answer.text for answer in _answers(table, row) or ()])
            for row, prediction in enumerate(predictions)
        ]
        measure = metrics.means(
            exact_match=np.array([spans.exact_match(*pair) for pair in pairs]),
            f1=np.array([spans.f1(*pair) for pair in pairs]),
        )
        return metrics.scored([measure], len(pairs))


# --- answers ----------------------------------------------------------------------------------


def _value(table: Table, row: int) -> Any:
    return table.columns["answers"][row]


def _answers(table: Table, row: int) -> list[Answer] | None:
    """The answers of a row, none for a question without; None for what cannot be read."""
    value = _value(table, row)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    try:
        if isinstance(value, str):
            starts = table.columns.get("answer_start")
            start = None if starts is None or is_missing(starts[row]) else int(starts[row])
            return [Answer(value, start)] if value.strip() else None
        if isinstance(value, dict):
            value = [
                {"text": text, "answer_start": start}
                for text, start in zip(value["text"], value["answer_start"], strict=True)
            ]
        return [Answer(one["text"], int(one["answer_start"])) for one in value]
    except (KeyError, TypeError, ValueError):
        return None


def _answer_problem(answer: Answer, context: str) -> Problem | None:
    problem = text_problem(answer.text, "answer")
    if problem is not None:
        return problem
    shown = repr(answer.text[:60])
    count = context.count(answer.text)
    if count == 0:
        return "answer is not in its context", f"got {shown}"
    if answer.start is None:
        if count > 1:
            return "answer without its place", f"{shown} stands in the context {count} times"
        return None
    if answer.start >= 0 and context.startswith(answer.text, answer.start):
        return None
    elsewhere = f"but only at {context.find(answer.text)}" if count == 1 else f"but {count} times"
    return (
        "answer is not at its place",
        f"{shown} does not stand at character {answer.start} of the context, {elsewhere}",
    )


def _token_spans(table: Table, contexts: Ragged, characters: Array) -> Array:
    """(N, 2): first and last token of each row's answer in its context; -1 where there is none."""
    out = np.full((len(table), 2), -1)
    for row, context in enumerate(table.columns["context"]):
        for answer in (_answers(table, row) or ())[:1]:
            first = contexts.starts[row]
            starts, ends = characters[first : first + contexts.lengths[row]].T
            place = answer.place(context)
            span = spans.token_span(starts, ends, place, place + len(answer.text))
            if span is None:
                raise ValueError(
                    f"{table.at(row)}: answer: the tokenizer makes no token of {answer.text!r}"
                )
            out[row] = span
    return out
