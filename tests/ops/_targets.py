"""Who is tested where: every backend of an op in the table, on each device that it can compute on.

Parity tests take ``@pytest.mark.parametrize("target", targets("attention"), indirect=True)``; the
fixture ``target`` in conftest.py forces that backend, or skips with the reason why it cannot run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastbert import device
from fastbert.ops import BACKENDS, OPS

# Triton's interpreter computes CPU tensors too: tests/kernels does that, on small cases.
DEVICES = {
    "cpp": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
    "reference": ("cpu", "cuda"),
}

DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Target:
    """One way in which an op is called.

    dtype: of activations and matrices.  vector_dtype: of biases and LayerNorm parameters.
    """

    backend: str
    device: str
    dtype: torch.dtype
    vector_dtype: torch.dtype

    def __str__(self) -> str:
        vectors = "" if self.vector_dtype == self.dtype else "-vectors_in_float32"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.backend}-{self.device}-{name}{vectors}"


def targets(
    op: str,
    *,
    vectors: bool = False,
    only: tuple[torch.dtype, ...] | None = None,
) -> list[Any]:
    """Parameters for every backend of ``op`` in the table and every dtype that it takes.

    vectors: each dtype a second time, with the vectors in fp32.
    only: leave out other dtypes.
    CUDA targets carry the mark ``gpu`` and are left out where torch finds no GPU.
    """
    return _parameters(_targets(tuple(OPS[op].modules), vectors), only)


def _parameters(chosen: Iterable[Target], only: tuple[torch.dtype, ...] | None = None) -> list[Any]:
    return [
        pytest.param(target, id=str(target), marks=[pytest.mark.gpu] * (target.device == "cuda"))
        for target in chosen
        if only is None or target.dtype in only
    ]


def _targets(backends: tuple[str, ...], vectors: bool) -> Iterator[Target]:
    has_gpu = device.cuda_reason() is None
    for backend in backends:
        for kind in DEVICES[backend]:
            if kind == "cuda" and not has_gpu:
                continue
            for dtype in DTYPES[kind]:
                if dtype not in BACKENDS[backend].dtypes:
                    continue
                yield Target(backend, kind, dtype, dtype)
                if vectors and dtype != torch.float32:
                    yield Target(backend, kind, dtype, torch.float32)


def matmul_targets(*, only: tuple[torch.dtype, ...] | None = None) -> list[Any]:
    """Parameters for what is no op of the table but torch's products: devices and dtypes alone."""
    return _parameters(_targets(("reference",), vectors=True), only)


def backends_on_cpu(op: str) -> list[str]:
    """The backends of ``op`` that compute CPU tensors, for tests that need no more of a target."""
    return [backend for backend in OPS[op].modules if "cpu" in DEVICES[backend]]


class Draw:
    """Random tensors in a target's dtype and on its device, the same at every run.

    Values are drawn in fp64 on the CPU and then rounded: a tensor of a given place in the sequence
    of calls holds the same numbers, up to that rounding, for every target.
    """

    def __init__(self, target: Target, seed: int = 0) -> None:
        self.target = target
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """Normal numbers times ``scale`` plus ``shift`` in the dtype of activations."""
        return self._normal(shape, scale, shift).to(self.target.device, self.target.dtype)

    def vector(self, size: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """The same for a bias or a LayerNorm parameter."""
        return self._normal((size,), scale, shift).to(self.target.device, self.target.vector_dtype)

    def ids(self, bound: int, count: int) -> torch.Tensor:
        """``count`` int64 numbers in 0 .. bound - 1."""
        values = torch.randint(bound, (count,), generator=self._generator)
        return values.to(self.target.device)

    def ascending(self, bound: int, count: int) -> torch.Tensor:
        """``count`` different int64 numbers in 0 .. bound - 1, in ascending order."""
        values = torch.randperm(bound, generator=self._generator)[:count].sort().values
        return values.to(self.target.device)

    def _normal(self, shape: tuple[int, ...], scale: float, shift: float) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values * scale + shift
