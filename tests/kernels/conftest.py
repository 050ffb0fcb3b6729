"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fresh tensors hold NaN (integers their maximum): an element left unwritten cannot pass."""

    def poisoned(function):
        def allocate(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
