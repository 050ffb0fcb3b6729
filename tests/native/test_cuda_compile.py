"""The CUDA kernels compiled by nvcc, no GPU needed: nothing spills, registers stay within what the
design counts on, and the machine code uses the instructions that it should.

The registers, shared memory and spills of every kernel go to the test report as properties
(``--junit-xml``) and to the terminal with ``-s``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc to compile the CUDA kernels")

ARCHITECTURES = [
    pytest.param("sm_80", marks=pytest.mark.slow),
    "sm_90",
    pytest.param("sm_100", marks=pytest.mark.slow),
]

# Most registers a thread that a kernel may take, by the start of its name. An SM has 65536.
MOST_REGISTERS = {
    "attention_fwd_mma": 255,  # 128 threads: two blocks
    "attention_fwd_any": 64,  # 256 threads: four
    "attention_bwd_keys": 255,  # 128 threads: two blocks; 256: one
    "attention_bwd_queries": 255,  # 128 threads: two blocks
    "attention_bwd_any": 80,  # 256 threads: three
    "bias_gelu_fwd": 64,  # 256 threads: four
    "bias_gelu_bwd": 80,  # 256 threads: three
    "add_layer_norm_fwd": 104,  # 128 threads: four, at 1024 columns of fp32
    "add_layer_norm_bwd": 255,  # 128 threads: two, at 1024 columns
    "add_layer_norm_wide": 80,
    "sum_groups": 64,
}


@dataclass
class Kernel:
    """What ptxas says of a kernel; ``name`` with its template arguments, ``symbol`` mangled."""

    symbol: str
    name: str
    registers: int
    shared: int
    stack: int
    spills: int


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cubins(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, tuple[Path, str]]:
    """Source -> its machine code and what ptxas printed."""
    folder = tmp_path_factory.mktemp(architecture)

    def compile_one(source: Path) -> tuple[Path, str]:
        cubin = folder / f"{source.stem}.cubin"
        flags = "-O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -cubin"
        done = subprocess.run(
            [str(NVCC), *flags.split(), f"-arch={architecture}", str(source), "-o", str(cubin)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return cubin, done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


@pytest.fixture(scope="module")
def kernels(cubins: dict[Path, tuple[Path, str]]) -> list[Kernel]:
    return [kernel for _, log in cubins.values() for kernel in _parse(log)]


def test_no_kernel_spills(
    kernels: list[Kernel], architecture: str, record_property: pytest.RecordProperty
) -> None:
    assert len(kernels) > 50
    print(f"\n{architecture}: registers, static shared bytes, stack bytes, spill bytes")
    for kernel in sorted(kernels, key=lambda k: k.name):
        figures = (kernel.registers, kernel.shared, kernel.stack, kernel.spills)
        record_property(f"{architecture} {kernel.name}", figures)
        print(f"{kernel.name:64}" + "".join(f"{figure:6}" for figure in figures))
    assert [k.name for k in kernels if k.spills or k.stack] == []


def test_registers_stay_within_their_budget(kernels: list[Kernel]) -> None:
    over = []
    for kernel in kernels:
        (budget,) = (n for start, n in MOST_REGISTERS.items() if kernel.name.startswith(start))
        if kernel.registers > budget:
            over.append(f"{kernel.name}: {kernel.registers} registers, at most {budget} wanted")
    assert over == []


def test_machine_code(cubins: dict[Path, tuple[Path, str]], kernels: list[Kernel]) -> None:
    disassembler = _cuobjdump()
    if disassembler is None:
        pytest.skip("needs cuobjdump (in the triton wheel, or CUDA's) to read the machine code")
    names = {kernel.symbol: kernel.name for kernel in kernels}
    code: dict[str, str] = {}
    for cubin, _ in cubins.values():
        text = subprocess.run(
            [disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        for function in text.split("Function : ")[1:]:
            symbol, body = function.split("\n", 1)
            code[names[symbol.strip()]] = body
    assert code.keys() == set(names.values())

    for name, sass in code.items():
        instructions = set(re.findall(r"\b[A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*", sass))

        def has(pattern: str, instructions: set[str] = instructions) -> bool:
            return any(re.fullmatch(pattern, i) for i in instructions)

        assert not has(r"(LDL|STL)\b.*"), f"{name} uses local memory"
        assert not has(r"(RED|ATOM)\w*\..*"), f"{name} uses atomics: sums in any order"
        if name.startswith(("attention_fwd_mma", "attention_bwd_keys", "attention_bwd_queries")):
            kind = r"HMMA\.16816\.F32\.BF16" if "bfloat16" in name else r"HMMA\.16816\.F32"
            assert has(kind), f"{name} does not multiply on tensor cores"
            assert has(r"LDGSTS\..*128.*"), f"{name} does not copy 16 bytes at a time"
            assert has(r"LDSM\.16\.M88\.4") and has(r"LDSM\.16\.MT88\.4")
            assert has(r"STG\..*128.*")
        elif _is_vectorized(name):
            assert has(r"LDG\..*128.*"), f"{name} does not load 16 bytes at a time"
            assert has(r"STG\..*128.*"), f"{name} does not store 16 bytes at a time"


def _is_vectorized(name: str) -> bool:
    """Kernels of activations, but for those compiled for one element a thread."""
    if name.startswith(("sum_groups", "attention", "add_layer_norm_wide_sums")):
        return False
    return not re.search(r", 1[,>]", name)


def _parse(log: str) -> list[Kernel]:
    """Reads the lines that `-Xptxas -v` prints for each kernel."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", part)[1])  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        symbol = part.split("'", 1)[0]
        found.append(
            Kernel(symbol, _short_name(symbol), registers, int(shared[1]) if shared else 0, stack,
                   stores + loads)
        )  # fmt: skip
    return found


def _short_name(symbol: str) -> str:
    """``add_layer_norm_fwd_kernel<bfloat16, 24>`` from the mangled name."""
    name = re.search(r"\d([a-z][a-z_]*_kernel)(I.*?E)?Ev?", symbol)
    assert name, symbol
    arguments = re.findall(r"(6__half)|(13__nv_bfloat16)|(f)|L[ib](\d+)E", (name[2] or "")[1:])
    words = [
        "half" if half else "bfloat16" if bf16 else "float" if f else number
        for half, bf16, f, number in arguments
    ]
    return f"{name[1]}<{', '.join(words)}>" if words else name[1]


def _cuobjdump() -> str | None:
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")
