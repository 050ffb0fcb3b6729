"""Scores against cases computed by hand and against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.finetune import metrics
from fastbert.finetune.metrics import Score

RANDOM = np.random.default_rng(0)


def values(measure: metrics.Measure, rows: int) -> dict[str, float]:
    return measure(np.ones(rows))


# --- against scikit-learn and SciPy -----------------------------------------------------------

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(classes)
@settings(deadline=None, max_examples=60)
def test_classification(rows: list[tuple[int, int]]) -> None:
    gold, predicted = np.array(rows).T
    found = values(metrics.classification(gold, predicted, 4), len(rows))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted))
    macro = sk.f1_score(gold, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(gold, predicted), abs=1e-12)
    assert np.array_equal(
        metrics.confusion(gold, predicted, 4),
        sk.confusion_matrix(gold, predicted, labels=range(4)),
    )


@given(classes)
@settings(deadline=None, max_examples=60)
def test_two_classes(rows: list[tuple[int, int]]) -> None:
    gold, score = np.array(rows).T
    gold = gold % 2  # scores 0 .. 3: many ties
    found = values(metrics.roc_auc(gold, score), len(rows))["auc"]
    if gold.min() == gold.max():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(sk.roc_auc_score(gold, score))
    predicted = score % 2
    f1 = values(metrics.classification(gold, predicted, 2), len(rows))["f1"]
    assert f1 == pytest.approx(sk.f1_score(gold, predicted, zero_division=0))


def test_label_sets() -> None:
    gold, predicted = (RANDOM.random((50, 5)) < 0.3 for _ in range(2))
    found = values(metrics.label_sets(gold, predicted), 50)
    for name in ("micro", "macro"):
        expected = sk.f1_score(gold, predicted, average=name)
        assert found[f"{name}_f1"] == pytest.approx(expected)
    assert found["exact_match"] == sk.accuracy_score(gold, predicted)


def test_regression() -> None:
    gold = RANDOM.integers(0, 10, 200) / 2  # many ties
    predicted = gold + RANDOM.normal(0, 1, 200).round(1)
    found = values(metrics.regression(gold, predicted), 200)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(gold, predicted).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(gold, predicted).statistic)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(gold, predicted))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_the_correlation_with_a_constant_is_0(constant: float) -> None:
    found = values(metrics.regression(np.arange(7.0), np.full(7, constant)), 7)
    assert found["pearson"] == found["spearman"] == 0.0


# --- by hand ----------------------------------------------------------------------------------


def test_calibration() -> None:
    """Bins of width 1/2: {0.4} with 0 right of 1, and {0.6, 0.9, 1.0} with 2 right of 3."""
    confidence = np.array([0.4, 0.6, 0.9, 1.0])
    right = np.array([False, True, False, True])
    found = values(metrics.calibration(confidence, right, bins=2), 4)["calibration_error"]
    assert found == pytest.approx((1 * 0.4 + 3 * abs(2.5 / 3 - 2 / 3)) / 4)
    rows, mean, accuracy = metrics.reliability(confidence, right, bins=3)
    assert rows.tolist() == [0, 2, 2]
    assert np.isnan(mean[0]) and np.isnan(accuracy[0])
    assert mean[1:] == pytest.approx([0.5, 0.95])
    assert accuracy[1:] == pytest.approx([0.5, 0.5])


def test_means_and_ratios() -> None:
    weights = np.array([1.0, 2.0, 0.0])
    assert metrics.means(x=np.array([1.0, 4.0, 9.0]))(weights) == {"x": 3.0}
    ratios = metrics.ratios(x=(np.array([1, 2, 9]), np.array([2, 4, 9])), y=(weights, 0 * weights))
    assert ratios(weights) == {"x": 0.5, "y": 0.0}


# --- weights and the bootstrap ----------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any))
@settings(deadline=None, max_examples=40)
def test_a_weight_is_a_number_of_copies(counts: list[int]) -> None:
    weights = np.array(counts, np.float64)
    x, y = RANDOM.integers(0, 3, (2, 12))
    sets = RANDOM.random((2, 12, 3)) < 0.5
    u, v = RANDOM.integers(0, 4, (2, 12)) / 4

    def measured(index: np.ndarray) -> list[metrics.Measure]:
        return [
            metrics.classification(x[index], y[index], 3),
            metrics.roc_auc(x[index] % 2, u[index]),
            metrics.calibration(u[index], x[index] == y[index]),
            metrics.label_sets(sets[0][index], sets[1][index]),
            metrics.regression(u[index], v[index]),
        ]

    copied = np.repeat(np.arange(12), counts)
    pairs = zip(measured(np.arange(12)), measured(copied), strict=True)
    for weighted, plain in pairs:
        found, expected = weighted(weights), values(plain, len(copied))
        assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_interval_is_the_binomials() -> None:
    """Of a mean of zeros and ones: p +- 1.96 sqrt(p (1 - p) / N)."""
    right = np.arange(1000) < 800
    (score,) = metrics.scored([metrics.means(x=right)], 1000).values()
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert score.value == 0.8
    assert score.low == pytest.approx(0.8 - half, abs=0.003)
    assert score.high == pytest.approx(0.8 + half, abs=0.003)
    again = metrics.scored([metrics.means(x=right)], 1000)
    assert again == {"x": score}, "the same seed draws the same rows"


def test_resamples_without_a_score_do_not_count() -> None:
    """Of two rows, half of the resamples hold one class only."""
    scores = metrics.scored([metrics.roc_auc(np.array([0, 1]), np.array([0.1, 0.9]))], 2)
    assert scores == {"auc": Score(1.0, 1.0, 1.0)}
    scores = metrics.scored([metrics.roc_auc(np.array([1]), np.array([0.9]))], 1)
    assert np.isnan(scores["auc"]).all()
    with pytest.raises(ValueError, match="rows: got 0, expected 1 or more"):
        metrics.scored([], 0)
