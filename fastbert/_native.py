"""The two compiled modules, imported when first asked for, and the reason where one is missing.

``fastbert._cpu`` holds the C++ kernels, ``fastbert._cuda`` the CUDA ones. Each may be absent: left
out at build time (``FASTBERT_NATIVE=0``, no nvcc) or unloadable here. That is an answer for
``fastbert doctor`` and for the dispatch of ops, never an ImportError.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fastbert import device


class NativeUnavailable(RuntimeError):
    """A compiled module is not there; the text says why, and what to do."""


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py wrote about the build of this installation; empty where nothing was compiled.

    Keys: ``version``, ``python``, ``cxx``, ``nvcc`` (None: not used), ``cuda_targets`` and
    ``cuda_skipped`` (None: built).
    """
    try:
        text = Path(__file__).with_name("_build.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return json.loads(text)


@functools.cache
def cpu() -> ModuleType:
    """``fastbert._cpu``, set to the instruction set that FASTBERT_CPU_ISA names, if it names one.

    Raises:
        NativeUnavailable: the module is not there.
        ValueError: FASTBERT_CPU_ISA names an instruction set that the module or the CPU lacks.
    """
    module = _loaded("_cpu")
    isa = device.setting("FASTBERT_CPU_ISA")
    if isa is not None:
        if isa not in module.available_isas():
            available = ", ".join(module.available_isas())
            raise ValueError(f"FASTBERT_CPU_ISA={isa!r}: expected one of {available} here")
        module.set_isa(isa)
    return module


def cuda() -> ModuleType:
    """``fastbert._cuda``; it loads without a GPU too.

    Raises:
        NativeUnavailable: the module is not there.
    """
    return _loaded("_cuda")


def cpu_reason() -> str | None:
    """None when ``cpu()`` returns the module, else why not, in words."""
    return _reason(_load("_cpu"))


def cuda_reason() -> str | None:
    """None when ``cuda()`` returns the module, else why not, in words."""
    return _reason(_load("_cuda"))


def cuda_target_reason(capability: tuple[int, int]) -> str | None:
    """None when ``fastbert._cuda`` was built for GPUs of ``capability``, else why not, in words."""
    targets = build_info().get("cuda_targets", [])
    if not targets or any(_serves(target, capability) for target in targets):
        return None
    here = "sm_{}{}".format(*capability)
    return f"fastbert._cuda is built for {', '.join(targets)}, and this GPU is {here}"


def _serves(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``target`` runs on GPUs of ``capability``.

    Machine code for sm_XY runs on X.Y and later X.*, the driver compiles compute_XY for X.Y and all
    that came after; with an "a" either serves X.Y alone, with an "f" its family X.*.
    """
    kind, _, number = target.partition("_")
    digits = number.rstrip("af")
    built_for = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return built_for == capability
    anywhere = kind == "compute" and not number.endswith("f")
    return built_for <= capability and (anywhere or built_for[0] == capability[0])


def _reason(loaded: ModuleType | str) -> str | None:
    return loaded if isinstance(loaded, str) else None


def _loaded(name: str) -> ModuleType:
    loaded = _load(name)
    if isinstance(loaded, str):
        raise NativeUnavailable(loaded)
    return loaded


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The compiled module ``fastbert.<name>``, or the reason why there is none."""
    full_name = f"fastbert.{name}"
    try:
        return importlib.import_module(full_name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == full_name:
            return _why_not_built(name)
        return f"{full_name} is built but fails to load: {error}"


def _why_not_built(name: str) -> str:
    info = build_info()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not info:
        return (
            f"fastbert.{name} is not built: installed with FASTBERT_NATIVE=0, or run from sources "
            "that were never installed (pip install . builds it)"
        )
    if info["python"] != here:
        return f"fastbert.{name} is built for Python {info['python']} only, and this is {here}"
    if name == "_cuda" and info["cuda_skipped"]:
        return f"fastbert._cuda is not built: {info['cuda_skipped']}"
    return f"fastbert.{name} was built, but its file is gone: install fastbert again"
