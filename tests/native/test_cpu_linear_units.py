"""Which Linear kernels are built and chosen, and those for AMX, on emulated tiles.

The machines that test this seldom have AMX: linear_amx.cpp is compiled with the tiles of
amx_tiles_emulated.h and compared with numpy, and the built module is searched for the instructions.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fastbert import _native, device

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

native = _native.cpu()

Array = npt.NDArray
Float = np.float32
EPS = 2.0**-24


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bf16(x: Array) -> Array:
    """x rounded towards zero to what bf16 holds."""
    return (np.ascontiguousarray(x, Float).view(np.uint32) & 0xFFFF0000).view(Float)


def test_isas_are_those_of_the_cpu() -> None:
    """… in order, the first the default. A compiler before g++ 11 has no flags for some."""
    flags = device.cpu_flags()
    needs = {
        "amx": {"amx_int8", "amx_bf16", "avx512_bf16"},
        "avx512_vnni": {"avx512f", "avx512_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx2_vnni": {"avx2", "avx_vnni"},
        "avx2": {"avx2", "fma"},
        "portable": set(),
    }
    possible = [name for name, needed in needs.items() if needed <= flags]
    available = native.available_isas()
    assert [name for name in possible if name in available] == available
    old_compiler_lacks = {"amx", "avx512_vnni", "avx2_vnni"}
    assert set(possible) - set(available) <= old_compiler_lacks


ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cpu"


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        pytest.skip("needs g++")
    if not SOURCES.is_dir():
        pytest.skip("needs the sources")
    return found


@pytest.mark.parametrize("unit", ["avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx"])
def test_a_unit_without_its_flags_is_empty(unit: str, tmp_path: Path) -> None:
    """So it is built where the compiler is too old for them, and dispatch.cpp passes over it."""
    source, main = SOURCES / f"linear_{unit}.cpp", tmp_path / "main.cpp"
    declared = f"namespace fastbert::linear_{unit} {{ const void* linear_table(); }}"
    main.write_text(
        f"{declared}\nint main() {{ return fastbert::linear_{unit}::linear_table() != 0; }}"
    )
    program = tmp_path / "main"
    subprocess.run([compiler(), "-std=c++17", source, main, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0


def test_the_amx_unit_has_the_instructions_of_amx() -> None:
    if "x86_64" not in os.uname().machine or shutil.which("objdump") is None:
        pytest.skip("needs objdump, on x86-64")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "vpdpbusd" not in listing:
        pytest.skip("built by a compiler that is too old")
    for instruction in ("tdpbssd", "tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg"):
        assert f"{instruction} " in listing or f"{instruction}\n" in listing


class EmulatedAmx:
    """linear_amx.cpp on the tiles of amx_tiles_emulated.h."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.packed_bytes.restype = ctypes.c_int64
        self._library.quantized_stride.restype = ctypes.c_int64

    def __call__(self, w: Array, x: Array, splits: tuple[int, ...] = ()) -> Array:
        """w (out, in) int8 or uint16 (bf16), x int8 or fp32: x wᵀ, columns cut at `splits`."""
        kind = int(w.dtype == np.uint16)
        (n, k), rows = w.shape, len(x)
        padded = math.ceil(n / 64) * 64
        packed = np.empty(self._bytes(kind, k, n) + 64, np.int8)
        packed = packed[-packed.ctypes.data % 64 :]
        ones, zeros = (make(max(padded, rows), Float) for make in (np.ones, np.zeros))
        if kind == 0:
            stride = self._library.quantized_stride(ctypes.c_int64(k))
            x = np.pad(x, ((0, 0), (0, stride - k)))
        out = np.full((rows, n), np.nan, Float)
        i64, at = ctypes.c_int64, lambda array: ctypes.c_void_p(array.ctypes.data)
        self._library.pack(kind, at(w), i64(k), i64(n), at(packed))
        cuts = [0, *splits, n]
        for first, last in zip(cuts, cuts[1:], strict=False):
            vectors = at(packed), at(ones), at(zeros), at(x), at(ones), at(x)
            sizes = i64(rows), i64(first), i64(last)
            self._library.run(kind, i64(k), i64(n), *vectors, *sizes, at(out))
        return out

    def _bytes(self, kind: int, k: int, n: int) -> int:
        return self._library.packed_bytes(kind, ctypes.c_int64(k), ctypes.c_int64(n))


@functools.cache
def _amx_flags() -> list[str]:
    """Those of the unit but AMX itself, where this machine can run them."""
    names = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx2", "f16c", "avx512_bf16"}
    if not names <= device.cpu_flags():
        return []
    return [f"-m{name.replace('_', '')}" for name in sorted(names)]


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> EmulatedAmx:
    library = tmp_path_factory.mktemp("amx") / "amx.so"
    here = Path(__file__).parent
    command = [compiler(), "-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", *_amx_flags()]
    command += [f"-I{ROOT / 'csrc'}", f"-I{here}", '-DFASTBERT_AMX_TILES="amx_tiles_emulated.h"']
    command += [str(here / "amx_emulated.cpp"), str(SOURCES / "parallel.cpp"), "-ldl"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return EmulatedAmx(library)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (63, 33), (64, 64), (65, 130), (300, 70), (0, 5)])
def test_amx_int8_sums_are_exact(amx: EmulatedAmx, k: int, n: int) -> None:
    w = rng(k, n).integers(-127, 128, (n, k), np.int8)
    for rows in (0, 1, 15, 16, 17, 31, 32, 33, 65, 129, 257):
        x = rng(rows).integers(-127, 128, (rows, k), np.int8)
        expected = x.astype(np.int64) @ w.T.astype(np.int64)
        np.testing.assert_array_equal(amx(w, x), expected)
    np.testing.assert_array_equal(amx(w, x, tuple(range(64, n, 64))), expected)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 33), (32, 64), (33, 130), (300, 70), (0, 5)])
def test_amx_bf16_against_fp64(amx: EmulatedAmx, k: int, n: int) -> None:
    w = bf16(rng(k, n).standard_normal((n, k)))
    bits = np.ascontiguousarray(w.view(np.uint32) >> 16, np.uint16)
    for rows in (0, 1, 16, 17, 33, 129):
        x = bf16(rng(rows).standard_normal((rows, k)))
        terms = np.abs(x).astype(np.float64) @ np.abs(w.T)
        expected = x.astype(np.float64) @ w.T
        got = amx(bits, x)
        assert np.all(np.abs(got - expected) <= 4 * EPS * math.sqrt(k + 1) * terms)
        # Activations are rounded to the nearest, not cut off.
        np.testing.assert_array_equal(amx(bits, x * Float(1 - 2.0**-10)), got)
    np.testing.assert_array_equal(amx(bits, x, tuple(range(64, n, 64))), got)
    parts = [amx(bits, part) for part in np.split(x, [1, 7, 40])]
    np.testing.assert_array_equal(np.concatenate(parts), got)
