"""How benches time and record, on a GPU and, where its parts are stood in for, without one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_bench import _load

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


class FakeCuda:
    """Stands for what ``replay_of`` asks of CUDA. A call that waits (``wait``) raises where waiting
    is an error, and invalidates a recording, which then ends as torch's does: it raises, and leaves
    the generator inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.begun, self.inside, self.invalid = "default", 0, False, False
        for name, value in {
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: None})(),
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda: "stream",
            "current_device": lambda: 0,
            "graph": self.graph,
            "default_generators": [self],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "randn", self.randn)
        monkeypatch.setattr(torch, "Generator", lambda device: "fresh")
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: None, raising=False)

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any):
        assert stream == "stream" and self.mode == "default"
        self.begun, self.inside, self.invalid = self.begun + 1, True, False
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.inside = False

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.invalid = self.inside

    def randn(self, *shape: int, device: str) -> None:
        if self.inside:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def graphsafe_set_state(self, generator: Any) -> None:
        assert generator == "fresh"
        self.inside = False


def test_a_call_that_waits_is_refused_before_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, cuda = _load("timing"), FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="synchronizing"):
        timing.replay_of(cuda.wait)
    assert (cuda.begun, cuda.mode) == (0, "default")
    timing.replay_of(lambda: None)
    assert cuda.begun == 1


def test_no_recording_follows_one_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call waits in the recording alone; numbers can be drawn again afterwards."""
    timing, cuda = _load("timing"), FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="during capture"):
        timing.replay_of(lambda: cuda.inside and cuda.wait())
    torch.randn(1, device="cuda")
    with pytest.raises(RuntimeError, match="broke off before"):
        timing.replay_of(lambda: None)
    assert cuda.begun == 1


def test_a_recording_that_says_no_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an optimiser whose step no graph can hold, which raises without a call of CUDA."""
    timing, cuda = _load("timing"), FakeCuda(monkeypatch)

    def step() -> None:
        if cuda.inside:
            raise RuntimeError("capturable is False")

    with pytest.raises(RuntimeError, match="capturable"):
        timing.replay_of(step)
    timing.replay_of(lambda: None)


@pytest.mark.parametrize("way", [pytest.param("cuda", marks=on_a_gpu)])
def test_recordings_of_a_gpu(way: str) -> None:
    """A call that waits is refused, a forward and a backward of a kept graph are recorded."""
    timing, problem = _load("timing"), _load("problem")
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.randn(4, 4, device=way, requires_grad=True)
        with pytest.raises(RuntimeError):
            timing.replay_of(lambda: x.sum().item())
        for half in problem.HALVES:
            out: list[torch.Tensor] = []
            run = problem.half_of(half, lambda x: (x * x).sum(), [x], torch.ones((), device=way))
            timing.replay_of(lambda run=run, out=out: out.append(run()))()
            torch.cuda.synchronize()
            last = out[-1]
            expected = (x * x).sum() if half == "fwd" else 2 * x
            assert torch.equal(last if half == "fwd" else last[0], expected)
        torch.randn(1, device=way)
        torch.cuda.empty_cache()


def test_a_peers_backward_alone_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run, recorded = _load("run"), []
    monkeypatch.setattr(run, "peak_bytes", lambda call: 2**20)
    monkeypatch.setattr(run, "replay_of", lambda call: recorded.append(call()) or call)
    timing = _load("timing").Timing(3e-6, 3e-6, 3e-6, 1)
    monkeypatch.setattr(run, "interleave", lambda runs, *a, **k: dict.fromkeys(runs, timing))
    names = ("fastbert", "fastbert cuda", "peer")
    runs = {name: lambda name=name: name for name in names}
    for half, expected in (("bwd", list(names[:2])), ("fwd-bwd", list(names))):
        recorded.clear()
        candidates: dict[str, Any] = {name: {} for name in names}
        run._on_a_gpu(candidates, runs, half, 0.0)
        assert recorded == expected
        assert [name for name in names if "replay_us" in candidates[name]] == expected


def test_replays_are_compared_with_replays() -> None:
    ratio = _load("run")._ratio
    eager, both = {"median_us": 6.0}, {"median_us": 8.0, "replay_us": 3.0}
    assert ratio(both, {"median_us": 4.0, "replay_us": 2.0}) == 1.5
    assert ratio(eager, {"median_us": 4.0, "replay_us": 2.0}) == 1.5
    assert ratio(both, {"median_us": 4.0}) == 2.0


def test_the_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timing = _load("timing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("COMMIT", raising=False)
    assert timing._commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc1234")
    assert timing._commit() == "abc1234"


def test_product_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, dx and dw of each product, whose shapes fit."""
    timing = _load("timing")
    monkeypatch.setattr(timing, "_PRODUCTS", {"a": (32, 24, 16)})
    rates = timing.product_rates("cpu", torch.float32)
    assert set(rates) == {"a", "a dx", "a dw"} and all(rate > 0 for rate in rates.values())


def test_a_run_leaves_the_rows_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that has no time says which case it cut off, until that has been measured."""
    run, out = _load("run"), tmp_path / "ops.json"
    problem = _load("problem")

    def make(where: str, dtype: torch.dtype):
        calls = {"peer": lambda: None}
        return problem.Problem(lambda: torch.ones(2), calls, 8, 0, lambda: problem.Parity(0.5))

    both = [problem.Case("op", name, make) for name in ("a", "b")]
    monkeypatch.setattr(run, "cases", lambda where: both)
    monkeypatch.setattr(run, "ceilings", lambda *a: {"copy_gb_s": 1.0, "matrix_gflop_s": 1.0})

    def main(*options: str) -> dict[str, Any]:
        words = ["run.py", "--device", "cpu", "--dtype", "fp32", "--seconds", "0"]
        monkeypatch.setattr("sys.argv", [*words, "--out", str(out), *options])
        assert run.main() == 0
        return json.loads(out.read_text())

    assert [row["case"] for row in main("--case", "b")["rows"]] == ["b"]
    late = main("--case", "a", "--until", "1e-9")
    assert late["cut_off"] == ["op a fp32"] and len(late["rows"]) == 1
    whole = main("--case", "a")
    assert whole["cut_off"] == [] and [row["case"] for row in whole["rows"]] == ["b", "a"]
