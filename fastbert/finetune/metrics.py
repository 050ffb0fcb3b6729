"""Scores with confidence intervals. All of them are fractions, 0 .. 1, never per cent.

A measure is a function of weights (N,), one a row, whole numbers: how many times each row counts.
Ones give the score itself; how often rows are drawn with replacement, one of the bootstrap (Efron,
Bootstrap methods: another look at the jackknife, 1979, doi 10.1214/aos/1176344552).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Measure = Callable[[Array], dict[str, float]]


class Score(NamedTuple):
    """A score, and the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float


def scored(
    measures: Sequence[Measure], rows: int, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """The scores of all ``measures``, with the 2.5th and 97.5th percentiles of the bootstrap.

    A resample in which a score is not defined (nan) does not count in its interval.
    Raises ValueError where there are no rows.
    """
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected 1 or more")

    def all_scores(weights: Array) -> dict[str, float]:
        return {name: float(v) for measure in measures for name, v in measure(weights).items()}

    values = all_scores(np.ones(rows))
    random = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(values)))
    for sample in drawn:
        weights = np.bincount(random.integers(0, rows, rows), minlength=rows)
        sample[:] = list(all_scores(weights.astype(np.float64)).values())
    scores = {}
    for (name, value), samples in zip(values.items(), drawn.T, strict=True):
        defined = samples[~np.isnan(samples)]
        low, high = np.percentile(defined, (2.5, 97.5)) if len(defined) else (np.nan, np.nan)
        scores[name] = Score(value, float(low), float(high))
    return scores


# --- classes ----------------------------------------------------------------------------------


def classification(gold: Array, predicted: Array, classes: int) -> Measure:
    """accuracy, macro_f1, and mcc, of classes (N,) in 0 .. C - 1; f1 of class 1 where C is 2.

    F1 of a class: 2 TP / (gold + predicted). macro_f1: its mean over classes that occur in
    either. (Micro F1 of one class a row is the accuracy.)
    mcc: Matthews' correlation for C classes (Gorodkin, Comparing two K-category assignments by a
    K-category correlation coefficient, 2004, eq. 8); 0 where gold or prediction is constant.
    """
    right = gold == predicted

    def measure(weights: Array) -> dict[str, float]:
        hits = np.bincount(gold, weights * right, classes)
        of_gold = np.bincount(gold, weights, classes)
        of_predicted = np.bincount(predicted, weights, classes)
        total = weights.sum()
        scores = {
            "accuracy": hits.sum() / total,
            "macro_f1": _macro_f1(hits, of_gold, of_predicted),
            "mcc": _ratio(
                hits.sum() * total - of_gold @ of_predicted,
                np.sqrt((total**2 - of_gold @ of_gold) * (total**2 - of_predicted @ of_predicted)),
            ),
        }
        if classes == 2:
            scores["f1"] = _ratio(2 * hits[1], of_gold[1] + of_predicted[1])
        return scores

    return measure


def _macro_f1(hits: Array, of_gold: Array, of_predicted: Array) -> float:
    either = of_gold + of_predicted
    occurs = either > 0
    return float((2 * hits[occurs] / either[occurs]).mean()) if occurs.any() else 0.0


def _ratio(x: float, y: float) -> float:
    return x / y if y else 0.0


def roc_auc(gold: Array, score: Array) -> Measure:
    """auc: how often the score of a positive row (``gold`` 1) is above that of a negative one, ties
    counting half; nan without either."""
    place = np.unique(score, return_inverse=True)[1]

    def measure(weights: Array) -> dict[str, float]:
        positive = np.bincount(place, weights * gold)
        negative = np.bincount(place, weights * (1 - gold))
        below = np.cumsum(negative) - negative / 2
        pairs = positive.sum() * negative.sum()
        return {"auc": positive @ below / pairs if pairs else np.nan}

    return measure


def calibration(confidence: Array, right: Array, bins: int = 15) -> Measure:
    """calibration_error: sum over bins of n_b / N |accuracy_b - confidence_b| (Guo et al., arXiv
    1706.04599, eq. 3), with bins of equal width. The lower the better."""
    place = _bins(confidence, bins)

    def measure(weights: Array) -> dict[str, float]:
        gap = np.bincount(place, weights * (right - confidence), bins)
        return {"calibration_error": np.abs(gap).sum() / weights.sum()}

    return measure


def reliability(confidence: Array, right: Array, bins: int = 15) -> tuple[Array, Array, Array]:
    """(rows, mean confidence, accuracy) of each bin, (bins,); nan where it holds no row."""
    place = _bins(confidence, bins)
    rows = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = (np.bincount(place, x, bins) / rows for x in (confidence, right))
        return rows, *sums  # type: ignore[return-value]


def _bins(confidence: Array, bins: int) -> Array:
    """Bin of each: (0, 1/bins], (1/bins, 2/bins], …"""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def confusion(gold: Array, predicted: Array, classes: int) -> Array:
    """(C, C) int64: how often class ``row`` was taken for class ``column``."""
    counts = np.bincount(gold * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def label_sets(gold: Array, predicted: Array) -> Measure:
    """micro_f1, macro_f1, and exact_match, the rows with the right set, of (N, C) bool."""
    hits, either = gold & predicted, gold.astype(np.int64) + predicted
    exact = (gold == predicted).all(1)

    def measure(weights: Array) -> dict[str, float]:
        of_hits, of_either = weights @ hits, weights @ either
        return {
            "micro_f1": _ratio(2 * of_hits.sum(), of_either.sum()),
            "macro_f1": _macro_f1(of_hits, of_either, np.zeros_like(of_either)),
            "exact_match": weights @ exact / weights.sum(),
        }

    return measure


# --- numbers ----------------------------------------------------------------------------------


def regression(gold: Array, predicted: Array) -> Measure:
    """pearson, spearman, and mse. A correlation with something constant is taken for 0."""
    codes = [np.unique(x, return_inverse=True)[1] for x in (gold, predicted)]

    def measure(weights: Array) -> dict[str, float]:
        ranks = [_ranks(code, weights) for code in codes]
        error = gold - predicted
        return {
            "pearson": _pearson(gold, predicted, weights),
            "spearman": _pearson(ranks[0], ranks[1], weights),
            "mse": weights @ (error * error) / weights.sum(),
        }

    return measure


def _pearson(x: Array, y: Array, weights: Array) -> float:
    total = weights.sum()
    # A constant's deviations are 0 only if its mean is exact: counted from one of its own values.
    x, y = x - x[weights.argmax()], y - y[weights.argmax()]
    x, y = x - weights @ x / total, y - weights @ y / total
    return _ratio(weights @ (x * y), np.sqrt((weights @ (x * x)) * (weights @ (y * y))))


def _ranks(code: Array, weights: Array) -> Array:
    """Mean rank of each row among all rows, each counted ``weights`` times; ties share theirs.

    code: (N,) int, smaller ones for smaller values.
    """
    counts = np.bincount(code, weights)
    return (np.cumsum(counts) - (counts - 1) / 2)[code]


# --- sums -------------------------------------------------------------------------------------


def means(**values: Array) -> Measure:
    """The mean of each of ``values`` (N,), under its name."""

    def measure(weights: Array) -> dict[str, float]:
        return {name: weights @ value / weights.sum() for name, value in values.items()}

    return measure


def ratios(**values: tuple[Array, Array]) -> Measure:
    """sum of the first (N,) / sum of the second (N,), under its name; 0 where that is 0."""

    def measure(weights: Array) -> dict[str, float]:
        return {name: _ratio(weights @ x, weights @ y) for name, (x, y) in values.items()}

    return measure
