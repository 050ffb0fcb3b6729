"""The benches run, hold their gate, and the README's generated parts are current."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str):
    """A module of bench/, which is a folder of scripts and no package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_every_op_of_the_table_has_a_bench_case() -> None:
    from fastbert.ops import OPS

    cases = _load("cases")
    # cross_entropy_rows is timed inside linear_cross_entropy.
    assert set(OPS) - {"cross_entropy_rows"} <= {case.op for case in cases.cases("cuda")}
    with_kernel = {name for name, op in OPS.items() if "cpp" in op.modules}
    assert with_kernel - {"cross_entropy_rows"} <= {case.op for case in cases.cases("cpu")}


def test_the_int8_case_is_right_and_names_its_peers() -> None:
    problem = _load("cases_products").int8(64)("cpu", torch.float32)
    assert problem.check().over_bound <= 1
    assert {"torch Linear + GELU", "torch._int_mm"} <= set(problem.peers)
    problem.ours()


def test_a_case_that_fails_parity_reports_no_speed() -> None:
    run, cases, problem_module = _load("run"), _load("cases"), _load("problem")
    case = next(c for c in cases.cases("cpu") if c.op == "gather_rows")

    def broken(where: str, dtype: torch.dtype):
        problem = case.make(where, dtype)
        problem.check = lambda: problem_module.Parity(1.5)
        return problem

    failing = problem_module.Case("gather_rows", "broken", broken)
    row = run.measure(failing, "cpu", "fp32", {"copy_gb_s": 1.0}, 0.1)
    assert "failed" in row and "speedup" not in row and "candidates" not in row


def test_run_measures_a_case_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    command = [sys.executable, "bench/run.py", "--op", "gather_rows", "--dtype", "fp32"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--seconds", "0.2", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["versions"]["torch"] and result["ceilings"]["fp32"]["copy_gb_s"] > 0
    (row,) = result["rows"]
    assert row["speedup"] > 0 and row["error_over_bound"] <= 1


def test_a_peer_that_breaks_is_left_out_and_named() -> None:
    run, problem = _load("run"), _load("problem")

    def broken() -> None:
        raise RuntimeError("not on this GPU")

    def make(where: str, dtype: torch.dtype):
        calls = {"good": lambda: None, "bad": broken}
        return problem.Problem(lambda: torch.ones(2), calls, 8, 0, lambda: problem.Parity(0.5))

    row = run.measure(problem.Case("op", "case", make), "cpu", "fp32", {"copy_gb_s": 1.0}, 0.0)
    assert set(row["candidates"]) == {"fastbert", "good"} and row["best_peer"] == "good"
    assert "not on this GPU" in row["left_out"]["bad"] and row["deterministic"]


@pytest.mark.parametrize("half", ["fwd", "bwd", "fwd-bwd"])
def test_halves(half: str) -> None:
    """Backward alone runs forward once, however often it is called."""
    problem, calls = _load("problem"), []
    x = torch.ones(3, requires_grad=True)

    def square(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return x * x

    run = problem.half_of(half, square, [x], torch.ones(3))
    outputs = [run() for _ in range(3)]
    assert calls == {"fwd": [False] * 3, "bwd": [True], "fwd-bwd": [True] * 3}[half]
    for out in outputs:
        assert torch.equal(out if half == "fwd" else out[0], x * x if half == "fwd" else 2 * x)


def test_interleave_times_all_and_takes_medians() -> None:
    timing = _load("timing")
    calls: list[str] = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = timing.interleave(runs, "cpu", 0.0, least=4)
    assert calls.count("a") == calls.count("b") == 2 + 4
    assert all(t.calls == 4 and t.p10 <= t.median <= t.p90 for t in timings.values())


def test_mixed_lengths_count_real_tokens_only() -> None:
    model = _load("model")
    shape = model.Shape("mixed", 4, 32, "ragged")
    batch, lengths = model.make_batch(shape, "cpu")
    assert sum(lengths) == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
    assert not batch["input_ids"][batch["attention_mask"] == 0].any()


def test_generated_parts_of_the_readme_are_current() -> None:
    report = _load("report")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.fill(text, report.sections()) == text


def test_an_unknown_generated_section_is_an_error() -> None:
    report = _load("report")
    with pytest.raises(ValueError, match="nonsense"):
        report.fill("<!-- generated: nonsense -->\n<!-- end -->", report.sections())
