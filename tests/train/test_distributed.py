"""Two processes under DDP and FSDP2 do what one process does with the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from fastbert.train import AdamW, Lamb

from . import _ranks

pytestmark = pytest.mark.slow  # two processes that each import torch and transformers

Tensor = torch.Tensor
Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(place: Path) -> Results:
    """What one process computes, by model and optimiser; its checkpoints are in ``place``."""
    found = {}
    for model in ("native", "accelerated"):
        for kind in (AdamW, Lamb):
            name = f"{model}-{kind.__name__}"
            made: Any = _ranks.build(model)
            rows, steps = slice(None), range(_ranks.STEPS)
            found[name] = _ranks.train(made, kind, rows, steps, place / name)
    return found


@pytest.fixture(scope="module")
def ranks(place: Path, alone: Results) -> list[Results]:
    """What each rank computed, by case."""
    mp.spawn(_ranks.run_rank, (str(place),), nprocs=_ranks.WORLD_SIZE)
    found = []
    for rank in range(_ranks.WORLD_SIZE):
        files = place.glob(f"*-{rank}.safetensors")
        found.append({f.name.removesuffix(f"-{rank}.safetensors"): load_file(f) for f in files})
    return found


@pytest.fixture(params=_ranks.CASES)
def case(request: pytest.FixtureRequest, ranks: list[Results], alone: Results) -> Any:
    """(expected, what each rank found, name)"""
    model, _, kind = _ranks.CASES[request.param]
    return alone[f"{model}-{kind.__name__}"], [r[request.param] for r in ranks], request.param


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=lambda text: f"{name}: {text}")


def test_losses(case: Any) -> None:
    """The mean of the ranks' is that of the whole batch."""
    expected, found, name = case
    close(sum(r["losses"] for r in found) / len(found), expected["losses"], name)


def test_gradients_and_norms(case: Any) -> None:
    expected, found, _ = case
    keys = [key for key in expected if key.startswith(("gradient", "norm", "clipped"))]
    assert len(keys) > 30
    for key in keys:
        for rank in found:
            close(rank[key], expected[key], key)


def test_parameters_after_the_steps(case: Any) -> None:
    expected, found, _ = case
    for key in expected:
        if key.startswith("parameter"):
            # Adam's first steps are lr in size whatever the gradient's: roundings of a gradient
            # that is nearly 0 show.
            torch.testing.assert_close(found[0][key], expected[key], rtol=1e-3, atol=1e-4)
            assert torch.equal(found[0][key], found[1][key])


@pytest.mark.parametrize("name", _ranks.CASES)
def test_checkpoints_know_no_world_size(name: str, alone: Results, ranks: list[Results],
                                        place: Path) -> None:  # fmt: skip
    """Two ranks' checkpoint goes on in one process, and one process's on two ranks."""
    model, _, kind = _ranks.CASES[name]
    expected = alone[f"{model}-{kind.__name__}"]
    results = [_ranks.train(_ranks.build(model), kind, slice(None), range(2, _ranks.STEPS),
                            place / name, resume=True)]  # fmt: skip
    results += [r[f"{name}-resumed"] for r in ranks if f"{name}-resumed" in r]
    assert len(results) == (1 if "ddp" in name else 3)
    for found in results:
        for key in expected:
            if key.startswith("parameter"):
                torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
