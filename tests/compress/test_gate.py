"""The quality gate, and the report of sensitivity that it goes by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert.compress import QuantizedModel, quantize, sensitivity
from fastbert.packed import PackedBatch


@pytest.fixture
def fragile(native: Any) -> Any:
    """A model whose layer 1 suffers from int8: one channel of its FFN drowns the others."""
    model = native()
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.bias[3] = 500.0
        model.encoder.layer[1].output.dense.weight[:, 3] *= 1e-3
    return model


class Score:
    """100 - 100 * (relative error to the float model); counts its calls."""

    def __init__(self, model: Any, batches: list[PackedBatch]) -> None:
        self.batches = batches
        self.calls: list[Any] = []
        with torch.no_grad():
            self.expected = [model(batch=b).last_hidden_state for b in batches]

    def __call__(self, model: Any) -> float:
        self.calls.append(model)
        with torch.no_grad():
            got = [model(batch=b).last_hidden_state for b in self.batches]
        pairs = list(zip(got, self.expected, strict=True))
        error = sum(float((a - b).norm() ** 2) for a, b in pairs) ** 0.5
        return 100 - 100 * error / sum(float(b.norm() ** 2) for b in self.expected) ** 0.5


def test_nothing_is_kept_where_the_score_holds(native: Any, batches: Any) -> None:
    model = native()
    score = Score(model, batches)
    report = quantize(model, evaluate=score, max_loss=10.0).report
    assert report.kept == [] and len(score.calls) == 2 and score.calls[0] is model
    assert report.score_before == 100.0
    assert 90.0 <= report.score_after < 100.0
    assert not report.sensitivity


def test_the_most_sensitive_layer_is_kept_in_bf16(fragile: Any, batches: Any) -> None:
    whole = quantize(fragile, evaluate=Score(fragile, batches), max_loss=1e9).report.score_after
    bound = (100.0 - whole) / 2
    quantised = quantize(fragile, evaluate=Score(fragile, batches), max_loss=bound)
    report = quantised.report
    assert report.kept == ["layers.1"]
    assert report.score_before - report.score_after <= bound
    assert report.floating == [
        f"layers.1.{kind}" for kind in ("qkv", "attention_output", "up", "down")
    ]
    assert [row["name"] for row in report.sensitivity][0] == "layers.1"
    assert "layers.1" in str(report) and "score" in str(report)
    assert isinstance(quantised, QuantizedModel) and quantised.encoder.watch is None


def test_all_layers_when_that_is_what_it_takes(fragile: Any, batches: Any) -> None:
    score = Score(fragile, batches)
    bf16 = 100.0 - score(quantize(fragile, "bf16"))
    report = quantize(fragile, evaluate=score, max_loss=bf16 * 1.001).report
    assert len(report.kept) == 3 and not report.integer


def test_a_bound_that_nothing_holds_is_refused(native: Any, batches: Any) -> None:
    model = native()
    for scheme in ("int8-dynamic", "bf16"):
        with pytest.raises(ValueError, match="max_loss.*even with every Linear in bf16"):
            quantize(model, scheme, evaluate=Score(model, batches), max_loss=0.0)
    with pytest.raises(ValueError, match="nan"):
        quantize(model, evaluate=lambda m: float("nan"))


def test_sensitivity_finds_the_fragile_part(fragile: Any, batches: Any) -> None:
    table = sensitivity(fragile, batches, evaluate=Score(fragile, batches))
    layers = [row for row in table.rows if row["name"].count(".") == 1]
    linears = [row for row in table.rows if row["name"].count(".") == 2]
    assert len(layers) == 3 and len(linears) == 12
    assert layers[0]["name"] == "layers.1" and linears[0]["name"] == "layers.1.down"
    assert all(0.0 <= row["mean_error"] <= row["max_error"] for row in table.rows)
    assert layers[0]["score_lost"] == max(row["score_lost"] for row in layers)
    assert "layers.1.down" in str(table) and "layers.1.down" in table.to_json()
    static = sensitivity(fragile, batches, "int8-static")
    assert static.rows[0]["name"] == "layers.1"
    with pytest.raises(ValueError, match="scheme"):
        sensitivity(fragile, batches, "bf16")
