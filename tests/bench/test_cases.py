"""The ops' cases: parity, what they know of themselves, and what their criterion sees."""

from __future__ import annotations

import math

import pytest
import torch

from .test_bench import _load

FP32 = torch.float32


@pytest.mark.parametrize("half", ["fwd", "bwd", "fwd-bwd"])
@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("cases_rows", lambda m, half: m._add_layer_norm(5, half, 0.0, 24)),
        ("cases_rows", lambda m, half: m._add_layer_norm(5, half, 0.1, 24)),
        ("cases_rows", lambda m, half: m._bias_gelu(5, half, 40)),
        ("cases_products", lambda m, half: m._feed_forward(5, half, 16)),
        ("cases_attention", lambda m, half: m.make("ragged", 2, 12, half, 0.0, 2, 32)),
        ("cases_attention", lambda m, half: m.make("dense", 2, 12, half, 0.1, 2, 128)),
    ],
)
def test_parity_at_any_width(module: str, make, half: str) -> None:
    problem = make(_load(module), half)("cpu", FP32)
    found = problem.check()
    assert found.over_bound <= 1 and problem.half == half
    assert found.largest < 1e-3 and found.relative < 1e-5 and found.torch_relative < 1e-5
    problem.ours()


def test_attention_names_the_backend_that_sdpa_takes() -> None:
    make = _load("cases_attention").make
    named = {backend.name for backend in torch.nn.attention.SDPBackend.__members__.values()}
    problem = make("ragged", 2, 12, "fwd", 0.0, 2, 32)("cpu", FP32)
    assert problem.facts["torch SDPA"] in named - {"ERROR"}


def test_what_the_gpu_times_first_is_what_training_runs() -> None:
    """Should the time end, no forward is missed before a backward is."""
    cases = _load("cases")
    for op in ("attention", "add_layer_norm", "bias_gelu", "feed_forward"):
        names = [case.name for case in cases.cases("cuda") if case.op == op]
        assert names[0].removesuffix("-dropout").endswith("fwd-bwd")
        assert any(name.startswith("large") for name in names)
        assert len(set(names)) == len(names)
    names = [case.name for case in cases.cases("cuda") if case.op == "attention"]
    assert {name.split("-")[0] for name in names} == {"base", "large", "D32", "D128"}


def test_distances() -> None:
    problem = _load("problem")
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = problem.parity(torch.tensor([3.0, 4.5]), exact, 0.25, torch.tensor([3.0, 4.0]))
    assert (found.over_bound, found.largest, found.relative) == (0.5, 0.5, 0.1)
    assert (found.torch_largest, found.torch_relative) == (0.0, 0.0)


def test_not_a_number_is_the_worst() -> None:
    problem = _load("problem")
    good, bad = problem.Parity(0.9), problem.Parity(math.nan)
    assert problem.worst([good, bad]) is bad and problem.worst([bad, good]) is bad
    assert problem.equality(True).over_bound <= 1 < problem.equality(False).over_bound


def test_another_way_that_is_wrong_is_not_timed() -> None:
    """Nor one that cannot run; ours is, and the run says that it failed."""
    run, problem = _load("run"), _load("problem")

    def absent() -> None:
        raise ValueError("no such kernel here")

    def make(where: str, dtype: torch.dtype):
        ways = ("right", "wrong", "absent")
        checks = {"right": lambda: problem.Parity(0.5), "wrong": lambda: problem.Parity(math.nan)}
        return problem.Problem(
            lambda: None, {"peer": lambda: None}, 8, 0, lambda: problem.Parity(0.5),
            dict.fromkeys(ways, lambda: None), checks | {"absent": absent},
        )  # fmt: skip

    row = run.measure(problem.Case("op", "case", make), "cpu", "fp32", {"copy_gb_s": 1.0}, 0.0)
    assert set(row["candidates"]) == {"fastbert", "right", "peer"} and "speedup" in row
    assert list(row["wrong"]) == ["wrong"] and "wrong: wrong" in run._line(row)
    assert row["left_out"] == {"absent": "ValueError: no such kernel here"}


def test_a_check_by_another_backend_is_of_that_backend() -> None:
    from fastbert.ops import _registry

    problem = _load("problem")
    forced = problem.by_backend("reference", lambda: _registry._forced)
    assert (_registry._forced, forced(), _registry._forced) == (None, "reference", None)
