"""Compiles the CUDA kernels for the host and calls them as ``fastbert._cuda`` would be called.

``cuda_runtime.h`` and its neighbours stand in for CUDA's headers, so g++ compiles the very files
that nvcc does; ``emulator.cpp`` runs a block's threads as fibers that meet at barriers, shuffles
and MMAs.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
FLAGS = (
    "-O1 -std=c++17 -fPIC -fno-strict-aliasing -DFASTBERT_CUDA_EMULATOR -DFASTBERT_SM_90A "
    f"-I{HERE} -I{CSRC / 'cuda'}"
).split()
# Shared memory that the device offers a block: what attention_bwd.cu chooses by.
ONE_BLOCK, TWO_KERNELS = 227 * 1024, 32 * 1024


def compiler() -> str | None:
    return shutil.which("g++")


class EmulatedCuda:
    """The functions of csrc/cuda/ops.h on host memory; integers stand for addresses.

    An exception of the native function raises RuntimeError with its text.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def configure(
        self,
        *,
        reverse_threads: bool = False,
        eager_copies: bool = False,
        shared_bytes: int = ONE_BLOCK,
    ) -> None:
        """What real hardware leaves open: the order of threads between two meetings, whether an
        asynchronous copy or product is made when issued or only when waited for, and how much
        shared memory the device offers a block (sm_90 and sm_100: 227 KB; sm_80: 163 KB; sm_89:
        99 KB)."""
        self._library.emulator_configure(reverse_threads, eager_copies, shared_bytes)

    def __getattr__(self, name: str) -> Any:
        address = ctypes.c_void_p.in_dll(self._library, name).value

        def call(*arguments: int | float | bool) -> int | None:
            values = [
                ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a) for a in arguments
            ]
            returned = ctypes.CFUNCTYPE(_result(name), *map(type, values))(address)(*values)
            if isinstance(returned, bytes):
                raise RuntimeError(returned.decode())
            return returned

        return call


def _result(name: str) -> Any:
    """What a function returns: those that can fail return null or their exception's text."""
    if name.endswith("_workspace"):
        return ctypes.c_int64
    return ctypes.c_bool if name.endswith("_wgmma") else ctypes.c_char_p


def build(folder: Path) -> EmulatedCuda:
    """Compiles everything into ``folder``, two files at a time."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        _run(compiler() or "g++", *FLAGS, "-x", "c++", "-c", str(source), "-o", str(to))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "libfastbert_cuda_emulated.so"
    _run(compiler() or "g++", "-shared", *map(str, objects), "-o", str(library))
    return EmulatedCuda(library)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


_libc = ctypes.CDLL(None)
_mappings: list[mmap.mmap] = []


def fenced(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` that ends where readable memory ends: a read past it is a segmentation fault.

    Sizes that are no multiple of 16 bytes leave a gap of less than 16, to keep the start aligned.
    """
    size = x.numel() * x.element_size()
    room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    mapping = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    no_access = 0
    assert _libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, no_access) == 0
    _mappings.append(mapping)
    at = room - -(-size // 16) * 16
    copy = torch.frombuffer(mapping, dtype=torch.uint8, count=room)[at : at + size]
    copy = copy.view(x.dtype).view(x.shape)
    return copy.copy_(x)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that starts one element after a multiple of 16 bytes."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape).copy_(x)
