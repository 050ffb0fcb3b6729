"""What this process runs on and what its user asked for.

The only reader of ``os.environ`` and of device properties in the package: every answer about the
machine has one source. Nothing heavy is imported, and no device touched, until a function asks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import NamedTuple


class Setting(NamedTuple):
    """One environment variable: what it does, what it may hold, and the check of that."""

    meaning: str
    expected: str
    accepts: Callable[[str], bool]


def _one_of(*names: str) -> tuple[str, Callable[[str], bool]]:
    return "one of " + ", ".join(names), frozenset(names).__contains__


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


SETTINGS: dict[str, Setting] = {
    "FASTBERT_BACKEND": Setting(
        "the backend that every op is forced to; auto or unset: the best that can serve the call",
        *_one_of("auto", "cpp", "triton", "cuda", "reference"),
    ),
    "FASTBERT_STRICT": Setting(
        "1 turns every silent slow path into an error",
        *_one_of("0", "1"),
    ),
    "FASTBERT_CPU_ISA": Setting(
        "the instruction set of the C++ kernels; unset: the best one that the CPU has",
        # _native checks that the CPU has it
        *_one_of("portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx"),
    ),
    "FASTBERT_NUM_THREADS": Setting(
        "threads of the C++ kernels; unset: as many as torch uses",
        "a whole number from 1",
        _is_count,
    ),
}


def setting(name: str) -> str | None:
    """The value of the environment variable ``name``; None where it is unset or empty.

    Raises:
        KeyError: ``name`` is not in ``SETTINGS``.
        ValueError: the value is none that the variable may hold.
    """
    known = SETTINGS[name]
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not known.accepts(value):
        raise ValueError(f"{name}={value!r}: expected {known.expected}")
    return value


# --- the CPU ----------------------------------------------------------------------------------


@functools.cache
def _cpuinfo() -> tuple[dict[str, str], ...]:
    """/proc/cpuinfo, one dict a logical CPU; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return ()
    cpus = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        cpus.append({key.strip(): value.strip() for key, _, value in pairs})
    return tuple(cpus)


def cpu_flags() -> frozenset[str]:
    """The instruction sets of the CPU as Linux names them (``avx2``, ``avx512f``, …), or empty."""
    cpus = _cpuinfo()
    if not cpus:
        return frozenset()
    return frozenset(cpus[0].get("flags", cpus[0].get("Features", "")).split())


def cpu_name() -> str:
    """The CPU's own name, or its architecture where it tells none."""
    cpus = _cpuinfo()
    return (cpus[0].get("model name") if cpus else None) or platform.machine() or "unknown CPU"


def _usable_cpus() -> frozenset[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def num_cpus() -> int:
    """How many logical CPUs this process may run on."""
    return len(_usable_cpus())


def physical_cores() -> int:
    """How many distinct cores lie under those logical CPUs (two hardware threads are one core)."""
    usable = _usable_cpus()
    cores = {
        (cpu["physical id"], cpu["core id"])
        for cpu in _cpuinfo()
        if "physical id" in cpu and "core id" in cpu and int(cpu["processor"]) in usable
    }
    return len(cores) or len(usable)


def memory_bytes() -> int | None:
    """The machine's main memory in bytes, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


# --- GPUs and Triton --------------------------------------------------------------------------


def cuda_reason() -> str | None:
    """None when torch can use an NVIDIA GPU here, else why not, in words."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable NVIDIA GPU or driver"
    return None


def cuda_name(index: int) -> str:
    """The name of GPU ``index``, such as ``NVIDIA H200``."""
    import torch

    return torch.cuda.get_device_name(index)


def cuda_capability(index: int) -> tuple[int, int]:
    """The compute capability of GPU ``index``, such as (9, 0)."""
    import torch

    return torch.cuda.get_device_capability(index)


def triton_interpreted() -> bool:
    """Whether Triton is installed and asked, by TRITON_INTERPRET=1, to interpret its kernels."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
    return asked and importlib.util.find_spec("triton") is not None


def triton_reason() -> str | None:
    """None when Triton kernels can compute CUDA tensors here, else why not, in words."""
    return _triton_import_reason() or _c_compiler_reason() or cuda_reason()


@functools.cache
def _triton_import_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in many ways, all of them an answer
        return f"triton fails to import: {error}"
    return None


def _c_compiler_reason() -> str | None:
    """Triton compiles the host half of each kernel with a C compiler at run time."""
    import shutil  # it brings four compression libraries into every start of the runtime

    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))):
        return None
    return "triton needs a C compiler at run time and finds none: install gcc, or set CC"
