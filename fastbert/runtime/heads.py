"""What stands on the encoder: pooling, task heads and what their numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastbert.runtime.reference import ACTIVATIONS

Array = np.ndarray


class Classification(NamedTuple):
    """The best label of a sequence with its score, and every label's."""

    label: str
    score: float
    scores: dict[str, float]


class TaggedToken(NamedTuple):
    """A token: the characters start .. end of its text, and its best label with the score."""

    text: str
    start: int
    end: int
    label: str
    score: float


class Answer(NamedTuple):
    """A span: the characters start .. end of the context.

    score: the probability of its first token times that of its last, each over all tokens of the
    context. Without any token of context: no text, and 0.
    """

    text: str
    start: int
    end: int
    score: float


class Head:
    """Linears with an activation after each.

    facts: "takes" ("tokens", "first" or "pooled"), "steps" [[name, activation], …] and "pooler".
    tensors: fp32, by name.  Raises ValueError for one that is missing or does not fit.
    """

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        self.takes = facts["takes"]
        self._steps = [_linear(step, tensors) for step in facts["steps"] or []]
        self._pooler = [_linear(facts["pooler"], tensors)] if facts["pooler"] else []

    def of_tokens(self, x: Array) -> Array:
        """(T, H) -> logits (T, C)."""
        return _applied(self._steps, x)

    def of_sequences(self, x: Array, lengths: Array) -> Array:
        """(T, H) -> logits (B, C)."""
        first = _first(x, lengths)
        return _applied(
            [*self._pooler, *self._steps] if self.takes == "pooled" else self._steps, first
        )

    def pool(self, how: str, x: Array, lengths: Array) -> Array:
        """(T, H) -> (B, H): "mean", "cls", "max" or "pooler"; zeros for an empty sequence."""
        if how == "pooler":
            if not self._pooler:
                raise ValueError("pooling: got 'pooler', but the model has none of a known kind")
            return _applied(self._pooler, _first(x, lengths))
        if how == "cls":
            return _first(x, lengths)
        out = np.zeros((len(lengths), x.shape[1]), np.float32)
        full = lengths > 0
        if full.any():
            starts = (np.cumsum(lengths) - lengths)[full]
            reduce = np.add if how == "mean" else np.maximum
            out[full] = reduce.reduceat(x, starts, axis=0)
        return out / np.maximum(lengths, 1)[:, None].astype(np.float32) if how == "mean" else out


Step = tuple[Array, Array, str]


def _linear(step: Sequence[str], tensors: Mapping[str, Array]) -> Step:
    name, activation = step
    try:
        weight = tensors[f"{name}.weight"]
    except KeyError:
        raise ValueError(f"head.{name}.weight: missing") from None
    bias = tensors.get(f"{name}.bias", np.zeros(len(weight), np.float32))
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or activation not in ACTIVATIONS:
        raise ValueError(
            f"head.{name}: got weight {weight.shape}, bias {bias.shape}, activation {activation!r}"
        )
    return weight, bias, activation


def _applied(steps: Sequence[Step], x: Array) -> Array:
    for weight, bias, activation in steps:
        x = ACTIVATIONS[activation](x @ weight.T + bias)
    return x


def _first(x: Array, lengths: Array) -> Array:
    """(T, H) -> (B, H): the first token of each sequence; zeros for an empty one."""
    starts = np.cumsum(lengths) - lengths
    out = np.zeros((len(lengths), x.shape[1]), np.float32)
    out[lengths > 0] = x[starts[lengths > 0]]
    return out


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def classified(
    logits: Array, labels: Sequence[str], problem_type: str | None
) -> list[Classification]:
    """A Classification for each row of logits (B, C)."""
    if problem_type == "regression" or logits.shape[1] == 1:
        scores = logits
    elif problem_type == "multi_label_classification":
        scores = 0.5 + 0.5 * np.tanh(0.5 * logits)
    else:
        scores = softmax(logits)
    best = scores.argmax(1)
    return [
        Classification(labels[i], float(row[i]), dict(zip(labels, row.tolist(), strict=True)))
        for i, row in zip(best, scores, strict=True)
    ]


def tagged(
    text: str, windows: list[Any], logits: list[Array], stride: int, labels: Sequence[str]
) -> list[TaggedToken]:
    """A TaggedToken for each token of ``text`` but special ones; logits (n, C) a window."""
    bodies = [[i for i, m in enumerate(w.special_tokens_mask) if not m] for w in windows]
    step = len(bodies[0]) - stride
    margins: dict[int, tuple[int, int, int]] = {}  # token of the text -> (margin, window, place)
    for number, body in enumerate(bodies):
        last = number == len(bodies) - 1
        for place, i in enumerate(body):
            left = len(text) if number == 0 else place
            right = len(text) if last else len(body) - 1 - place
            candidate = (min(left, right), number, i)
            token = number * step + place
            margins[token] = max(margins.get(token, candidate), candidate)
    found = []
    for _, (_, number, i) in sorted(margins.items()):
        start, end = windows[number].offsets[i]
        scores = softmax(logits[number][i])
        best = int(scores.argmax())
        found.append(TaggedToken(text[start:end], start, end, labels[best], float(scores[best])))
    return found


def best_span(context: str, windows: list[Any], logits: list[Array], max_tokens: int) -> Answer:
    """The span of at most ``max_tokens`` tokens with the highest start plus end logit
    (Devlin et al., arXiv 1810.04805, section 4.2), over all windows.
    """
    best, place = -np.inf, (0, 0)
    masked = []
    for window, scores in zip(windows, logits, strict=True):
        inside = np.array([s == 1 for s in window.sequence_ids])
        start, end = np.where(inside[:, None], scores, -np.inf).T
        masked.append((start, end))
        sums = start[:, None] + end[None, :]
        sums = np.where(np.tril(np.triu(np.ones_like(sums)), max_tokens - 1) > 0, sums, -np.inf)
        i, j = np.unravel_index(sums.argmax(), sums.shape)
        if sums[i, j] > best:
            best = float(sums[i, j])
            place = (window.offsets[i][0], window.offsets[j][1])
    if best == -np.inf:
        return Answer("", 0, 0, 0.0)
    starts, ends = (np.concatenate(x).astype(np.float64) for x in zip(*masked, strict=True))
    score = float(np.exp(best - np.logaddexp.reduce(starts) - np.logaddexp.reduce(ends)))
    return Answer(context[place[0] : place[1]], *place, score)
