"""bench/model.py: what a row says, and that a shape that fails takes nothing from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_bench import _load


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = _load("model")
    two = [model.Shape("B2 S8", 2, 8), model.Shape("B3 mixed", 3, 12, "ragged")]
    monkeypatch.setattr(model, "shapes", lambda where, task: two)
    monkeypatch.setattr(model, "ceilings", lambda *a: {"matrix_gflop_s": 1.0})
    monkeypatch.setattr(model.flops, "peak", lambda *a: model.flops.Peak(1e12, "made up"))
    return model


def main(model: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, Any]:
    words = ["model.py", "--device", "cpu", "--size", "tiny", "--dtype", "fp32", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", [*words, "--peer", "HF SDPA", "--out", str(out), *options])
    code = model.main()
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("task", ["inference", "training", "pretraining"])
def test_rows(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str) -> None:
    code, result = main(model, monkeypatch, tmp_path / "model.json", "--task", task)
    assert code == 0 and result["failed"] == {} and result["cut_off"] == []
    assert {row["shape"] for row in result["rows"]} == {"B2 S8", "B3 mixed"}
    assert result["ceilings"]["fp32"]["peak_gflop_s"] == 1000
    for row in result["rows"]:
        ours, peer = row["candidates"]["fastbert"], row["candidates"]["HF SDPA"]
        assert row["best_peer"] == "HF SDPA"
        assert row["speedup"] == peer["median_ms"] / ours["median_ms"]
        assert ours["mfu"] == pytest.approx(ours["gflop_s"] / 1000)
        assert ("error" in ours) == (task == "inference")


def test_a_shape_that_fails_is_named(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And no longer, once it has been measured."""
    out, errors = tmp_path / "model.json", model._errors

    def wrong(runs: Any, batch: Any) -> dict[str, float]:
        found = errors(runs, batch)
        return found | ({"fastbert": 0.5} if len(batch["input_ids"]) == 2 else {})

    monkeypatch.setattr(model, "_errors", wrong)
    code, result = main(model, monkeypatch, out, "--task", "inference")
    assert code == 1 and [row["shape"] for row in result["rows"]] == ["B3 mixed"]
    (name,) = result["failed"]
    assert name == "inference tiny B2 S8 fp32" and "parity" in result["failed"][name]
    monkeypatch.setattr(model, "_errors", errors)
    code, result = main(model, monkeypatch, out, "--task", "inference", "--shape", "B2")
    assert code == 0 and result["failed"] == {} and len(result["rows"]) == 2


def test_no_peer_that_runs(model: Any) -> None:
    """The row has our times, and says why it has no other."""

    def broken() -> None:
        raise RuntimeError("not on this GPU")

    runs, left_out = model._that_run({"fastbert": lambda: None, "HF eager": broken})
    assert set(runs) == {"fastbert"} and "not on this GPU" in left_out["HF eager"]
    with pytest.raises(RuntimeError, match="not on this GPU"):
        model._that_run({"fastbert": broken})
    model._TASKS["inference"] = lambda at: model.Work(runs, left_out, [3, 4], 10, {})
    at = model.Setting(None, "tiny", "cpu", torch.float32, (), 0.0)
    row = model.measure("inference", at, 1.0)
    assert row["over"] == {} and "speedup" not in row and row["left_out"] == left_out
    assert model._line({"task": "inference", "shape": "B1", "dtype": "fp32"} | row)


def test_errors_are_of_real_tokens(model: Any) -> None:
    """Padded and packed outputs alike, against the first Hugging Face model's."""
    mask = torch.tensor([[1, 1], [1, 0]])
    theirs = torch.tensor([[[3.0], [0.0]], [[4.0], [9.0]]])
    packed = torch.tensor([[3.0], [0.5], [4.0]])
    runs = {
        "HF eager": lambda: theirs,
        "fastbert": lambda: theirs * mask[..., None],
        "fastbert, graphs": lambda: packed,
    }
    errors = model._errors(runs, {"attention_mask": mask})
    assert errors == {"HF eager": 0.0, "fastbert": 0.0, "fastbert, graphs": pytest.approx(0.1)}
    assert model._errors({"fastbert": lambda: theirs}, {"attention_mask": mask}) == {}


def test_ours_is_compiled_around_an_accelerated_model(model: Any) -> None:
    made = model.model_candidates.candidates(
        "BertModel", "cpu", torch.float32, (model.model_candidates.OURS_COMPILED,), "tiny"
    )
    plain, compiled = made.values()
    assert "forward" in vars(plain) and "forward" in vars(compiled._orig_mod)
    assert type(compiled) is torch._dynamo.eval_frame.OptimizedModule
