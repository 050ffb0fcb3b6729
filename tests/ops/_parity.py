"""The one criterion that holds every op on every backend, and the runs that it compares.

    err(ours, oracle) <= 2 * err(torch, oracle) + ATOL[dtype]

for each output and for the gradient of each input, by name. ``oracle`` is the same computation
written with torch operations in fp64, ``torch`` those very operations in the dtype under test, and

    err(a, b) = max |a - b| / max |b|        (the absolute error where b is 0 everywhere).

All three start from the same inputs: numbers that the dtype under test holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Function = Callable[..., Any]
Inputs = dict[str, "torch.Tensor | None"]

# For the cases in which torch is right by luck: 8 ulp of the largest value where the arithmetic is
# in the dtype itself (what another order may change in a sum of some hundred terms), one rounding
# where it is wider. In fp64 torch is the oracle and always right: there it is all that there is.
ATOL = {
    torch.float64: 4096 * torch.finfo(torch.float64).eps,
    torch.float32: 8 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}


def error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    """max |result - oracle| / max |oracle|; nan where ``result`` holds one."""
    if oracle.numel() == 0:
        return 0.0
    largest = oracle.abs().max().item() or 1.0
    return (result.double() - oracle).abs().max().item() / largest


def run(
    function: Function,
    inputs: Inputs,
    grad: torch.Tensor | None = None,
    wanted: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of ``function(**inputs)`` and the gradients of the first one, all by name.

    grad: the gradient of the first output; None where that is a scalar (then 1).
    wanted: names of the inputs that get a gradient; None: every input that is there.
    Names: ``out``, ``out1``, … for outputs, ``d<name>`` for gradients.
    """
    present = {name for name, x in inputs.items() if x is not None}
    names = sorted(present if wanted is None else present & set(wanted))
    leaves = {
        name: None if x is None else x.detach().requires_grad_(name in names)
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in names], grad)
    results = {f"out{i or ''}": x.detach() for i, x in enumerate(outputs)}
    return results | {f"d{name}": x for name, x in zip(names, gradients, strict=True)}


def check_parity(
    ours: Function, plain: Function, inputs: Inputs, grad: torch.Tensor | None = None
) -> None:
    """Hold ``ours`` to the criterion against ``plain``, its equation in torch operations.

    Both take the tensors of ``inputs`` by name; the dtype under test is that of the first one.
    """
    dtype = next(x.dtype for x in inputs.values() if x is not None)
    before = {name: None if x is None else x.clone() for name, x in inputs.items()}
    results = run(ours, inputs, grad)
    for name, x in inputs.items():
        assert x is None or torch.equal(x, before[name]), f"{name} was written to"
    torchs = run(plain, inputs, grad)
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    oracles = run(plain, wide, None if grad is None else grad.double())
    check_results(results, torchs, oracles, dtype)


def check_results(
    results: dict[str, torch.Tensor],
    torchs: dict[str, torch.Tensor],
    oracles: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """The criterion for every tensor of ``oracles``; one report of all that break it."""
    assert results.keys() == torchs.keys() == oracles.keys()
    broken = []
    for name, oracle in oracles.items():
        assert results[name].shape == oracle.shape, f"{name}: {tuple(results[name].shape)}"
        assert results[name].dtype == torchs[name].dtype, f"{name}: {results[name].dtype}"
        assert oracle.isfinite().all(), f"{name}: the case itself overflows"
        have = error(results[name], oracle)
        peer = error(torchs[name], oracle)
        if not have <= 2 * peer + ATOL[dtype]:  # so that nan breaks it
            broken.append(f"{name}: error {have:.3g}, torch's own {peer:.3g}")
    assert not broken, f"{dtype}: " + "; ".join(broken)


def check_each_gradient_alone(ours: Function, inputs: Inputs, grad: torch.Tensor | None) -> None:
    """Freezing all inputs but one changes no bit of that one's gradient, nor of the output."""
    together = run(ours, inputs, grad)
    for name, x in inputs.items():
        if x is not None:
            for key, alone in run(ours, inputs, grad, wanted=[name]).items():
                assert torch.equal(alone, together[key]), f"{key}, {name} alone with a gradient"


def check_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two runs gave the same tensors, bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{different} differ"
