"""The masked-LM steps, what they count, and the plots of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .test_bench import _load

FP32 = torch.float32


def test_lengths() -> None:
    """All within bounds, the same every time; an encyclopaedia's fill half of the longest."""
    lengths_of = _load("problem").lengths_of
    assert lengths_of("dense", 3, 128) == [128] * 3
    for kind in ("ragged", "wikipedia"):
        found = lengths_of(kind, 256, 512)
        assert found == lengths_of(kind, 256, 512) and len(found) == 256
        assert min(found) >= 8 and max(found) == 512 and found != sorted(found)
        assert 0.47 < sum(found) / (256 * 512) < 0.53


def test_the_batch_is_one_and_the_same_for_all() -> None:
    masked_lm = _load("masked_lm")
    batch = masked_lm.make_batch(masked_lm.Shape("", 4, 32, "wikipedia"), "cpu")
    real = batch.padded["attention_mask"].bool()
    assert batch.tokens == int(real.sum()) == batch.packed.num_tokens
    assert torch.equal(batch.padded["input_ids"][real], batch.packed.input_ids)
    assert torch.equal(batch.padded["labels"][real], batch.labels)
    assert (batch.padded["labels"][~real] == -100).all()
    chosen = batch.labels != -100
    assert (batch.packed.input_ids[chosen] == 103).all() and 0 < chosen.sum() < batch.tokens / 2


def test_flops_of_base() -> None:
    """545 M a token at 128, and 588 M at 512, without the last layer's unread rows."""
    masked_lm = _load("masked_lm")
    for length, expected in ((128, 545e6), (512, 588e6)):
        assert masked_lm.flops("base", [length] * 64) / (64 * length) == pytest.approx(
            expected, rel=0.07
        )


def test_every_step_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first losses without dropout agree; what a row says follows from its times."""
    waterfall, masked_lm = _load("waterfall"), _load("masked_lm")
    monkeypatch.setattr(waterfall, "STEPS", masked_lm.STEPS)
    rows = waterfall.measure(waterfall.Shape("", 2, 16, "ragged"), "tiny", "cpu", FP32, 0.0)
    assert [row["step"] for row in rows] == list(masked_lm.STEPS[:-1])  # no graphs on a CPU
    assert not any("failed" in row for row in rows), rows
    assert waterfall.agree(rows)
    for before, row in zip(rows, rows[1:], strict=False):
        assert row["over_last"] == before["median_ms"] / row["median_ms"]
        assert row["over_first"] == rows[0]["median_ms"] / row["median_ms"]


def test_a_stage_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    waterfall = _load("waterfall")

    def step_of(name: str, *rest: object):
        if name == "+ packed":
            raise RuntimeError("broken")
        return lambda: torch.tensor(10.0)

    monkeypatch.setattr(waterfall, "step_of", step_of)
    rows = waterfall.measure(waterfall.Shape("", 2, 16), "tiny", "cpu", FP32, 0.0)
    (failed,) = [row for row in rows if "failed" in row]
    assert failed == {"step": "+ packed", "failed": "RuntimeError: broken"}
    assert all("over_first" in row for row in rows if row is not failed)


def test_plots_of_all_results(tmp_path: Path) -> None:
    plots = _load("plots")
    machine = {"gpu": {}, "cpu": {"cpu": "a CPU"}, "date": "2026-01-01", "commit": "abc"}
    step = {"step": "HF eager", "median_ms": 2.0, "over_first": 1.0}
    shapes = {"B1": [step, {"step": "+ SDPA", "failed": "no"}]}
    results = {
        "waterfall_cpu": {"machine": machine, "size": "tiny", "dtype": "fp32", "shapes": shapes},
        "model_cuda": {"machine": machine, "rows": []},  # nothing was measured
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for name in ("ops_cpu", "model_cpu"):
        source = Path(plots.ROOT) / "results" / f"{name}.json"
        (tmp_path / source.name).write_text(source.read_text())
    made = plots.draw(tmp_path, tmp_path / "out")
    assert {path.name for path in made} == {"ops_cpu.png", "model_cpu.png", "waterfall_cpu.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
