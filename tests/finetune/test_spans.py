"""SQuAD's scores by hand; spans of tokens against the plain search for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.finetune.spans import best_span, exact_match, f1, normalise, token_span


def test_normalise() -> None:
    assert normalise("The  Panthers' (an) Theatre, a.") == "panthers theatre"


@pytest.mark.parametrize(
    ("predicted", "answers", "em", "score"),
    [
        ("the 308 points", ["308 points."], 1, 1),
        ("308 points in all", ["308 points"], 0, 2 * 2 / (4 + 2)),
        ("of of", ["of"], 0, 2 * 1 / (2 + 1)),
        ("points", ["nothing", "points scored", "points"], 1, 1),
        ("", [], 1, 1),
        ("x", [], 0, 0),
        ("the", ["an"], 1, 1),  # both are nothing
        ("", ["x"], 0, 0),
    ],
)
def test_scores(predicted: str, answers: list[str], em: float, score: float) -> None:
    assert exact_match(predicted, answers) == em
    assert f1(predicted, answers) == pytest.approx(score)


def test_token_span() -> None:
    """Tokens "308", "points" and "." of "308 points ."."""
    starts, ends = np.array([0, 4, 11]), np.array([3, 10, 12])
    assert token_span(starts, ends, 0, 3) == (0, 0)
    assert token_span(starts, ends, 1, 5) == (0, 1)  # parts of tokens
    assert token_span(starts, ends, 3, 12) == (1, 2)
    assert token_span(starts, ends, 3, 4) is None  # a blank
    assert token_span(starts, ends, 12, 14) is None


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=12),
    st.integers(1, 15),
)
def test_best_span(logits: list[tuple[int, int]], most: int) -> None:
    start, end = np.array(logits, np.float32).T
    found = best_span(start, end, most)
    spans = [(i, j) for i in range(len(start)) for j in range(i, min(i + most, len(start)))]
    assert (found.first, found.last) in spans
    assert found.score == start[found.first] + end[found.last]
    assert found.score == max(start[i] + end[j] for i, j in spans)
