"""The emulated CUDA kernels, built once for all tests of a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from .cuda_emulator import emulator


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> emulator.EmulatedCuda:
    if emulator.compiler() is None:
        pytest.skip("needs g++ to compile the kernels for the host")
    return emulator.build(tmp_path_factory.mktemp("cuda_emulated"))


@pytest.fixture
def launch(emulated: emulator.EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The launchers, with the emulated kernels behind them and no device to choose."""
    from fastbert.ops import _cuda_launch

    monkeypatch.setattr(_cuda_launch._native, "cuda", lambda: emulated)
    monkeypatch.setattr(_cuda_launch, "_on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(_cuda_launch, "_stream", lambda x: 0)
    emulated.configure()
    return _cuda_launch


@pytest.fixture(params=["wgmma", "mma"])
def tensor_cores(request: pytest.FixtureRequest, emulated: emulator.EmulatedCuda) -> Iterator[str]:
    """By which instruction attention multiplies, where it has both: head dimensions 64 and 128."""
    emulated.allow_wgmma(request.param == "wgmma")
    yield request.param
    emulated.allow_wgmma(True)
