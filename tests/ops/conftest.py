"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastbert import _native
from fastbert.ops import BACKENDS, use_backend


def _force(backend: str, device_type: str) -> Any:
    """``use_backend(backend)``, or a skip with the reason why it cannot run on this machine."""
    reason = BACKENDS[backend].reason(device_type)
    if reason is not None:
        # A build that promised C++ kernels and does not load them is a failure, not a skip.
        if backend == "cpp" and _native.build_info():
            pytest.fail(reason)
        pytest.skip(reason)
    return use_backend(backend)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A ``Target`` (see _targets.py) whose backend is forced while the test runs."""
    with _force(request.param.backend, request.param.device):
        yield request.param


@pytest.fixture
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that is forced while the test computes CPU tensors."""
    with _force(request.param, "cpu"):
        yield request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating tensors start as nan: an element that nobody writes shows in the result."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_and_fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
