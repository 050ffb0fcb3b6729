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
    "sm_90a",
    pytest.param("sm_100", marks=pytest.mark.slow),
]

# Most registers a thread that a kernel may take, by the start of its name (the least, where several
# do). An SM has 65536.
MOST_REGISTERS = {
    "attention_fwd_mma": 255,  # 128 threads: two blocks
    "attention_fwd_any": 64,  # 256 threads: four
    "attention_fwd_wgmma": 255,  # 256 threads: one
    "attention_fwd_wgmma_kernel<half, 64": 128,  # 256 threads: two
    "attention_fwd_wgmma_kernel<bfloat16, 64": 128,
    "attention_bwd_keys": 255,  # 128 threads: two blocks; 256: one
    "attention_bwd_queries": 255,  # 128 threads: two blocks
    "attention_bwd_any": 80,  # 256 threads: three
    "bias_gelu_fwd": 64,  # 256 threads: four
    "bias_gelu_bwd": 80,  # 256 threads: three
    "add_layer_norm_fwd": 104,  # 128 threads: four, at 1024 columns of fp32
    "add_layer_norm_bwd": 255,  # 128 threads: two, at 1024 columns
    "add_layer_norm_wide": 80,
    "embed_layer_norm_fwd": 104,  # 128 threads: four
    "embed_layer_norm_bwd": 255,  # 128 threads: two, at 1024 columns
    "embed_layer_norm_wide": 104,
    "embedding_keys": 32,
    "embedding_chunks": 96,  # 128 threads: five
    "embedding_joins": 96,  # 256 threads: three, on sm_100 two
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
        target = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
        done = subprocess.run(
            [str(NVCC), *flags.split(), "-gencode", target, str(source), "-o", str(cubin)],
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
        budget = min(n for start, n in MOST_REGISTERS.items() if kernel.name.startswith(start))
        if kernel.registers > budget:
            over.append(f"{kernel.name}: {kernel.registers} registers, at most {budget} wanted")
    assert over == []


def test_wgmma_runs_beside_the_code_around_it(cubins: dict[Path, tuple[Path, str]]) -> None:
    """Where ptxas cannot tell who touches its registers it waits after every wgmma, and says so."""
    for _, log in cubins.values():
        assert "serialized" not in log, log


def test_machine_code(
    cubins: dict[Path, tuple[Path, str]], kernels: list[Kernel], architecture: str
) -> None:
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
        elif name.startswith("attention_fwd_wgmma"):
            if architecture == "sm_90a":
                _check_wgmma(name, sass)
                assert has(r"LDGSTS\..*128.*") and has(r"STG\..*128.*")
        elif _is_vectorized(name):
            assert has(r"LDG\..*128.*"), f"{name} does not load 16 bytes at a time"
            # These end in one column a thread.
            if not name.startswith(("embedding_joins", *WIDE_SUMS)):
                assert has(r"STG\..*128.*"), f"{name} does not store 16 bytes at a time"


WIDE_SUMS = ("add_layer_norm_wide_sums", "embed_layer_norm_wide_sums")


def _check_wgmma(name: str, sass: str) -> None:
    """Both products of a tile start together, and its softmax stands between their two waits."""
    dims = int(re.findall(r"\d+", name)[-2])
    keys = dims  # of a tile
    products = keys // 64 * (dims // 16) + dims // 64 * (keys // 16)
    kind = r"HGMMA\.64x64x16\.F32" + r"\.BF16" * ("bfloat16" in name)
    events = re.findall(rf"{kind}(?= )|DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2", sass)
    scores = events.index("DEPBAR.LE gsb0, 0x1")
    assert events[scores - products : scores] == [events[scores - 1]] * products, name
    assert events[scores - 1].startswith("HGMMA"), name
    # A thread has half as many scores as the tile has keys, in two rows, which one each rescales.
    softmax = keys // 2 + 2
    assert events[scores + 1 :][: softmax + 1] == ["MUFU.EX2"] * softmax + ["DEPBAR.LE gsb0, 0x0"]


def _is_vectorized(name: str) -> bool:
    """Kernels of activations, but for those compiled for one element a thread."""
    if name.startswith(("sum_groups", "attention", "embedding_keys")):
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


TYPES = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float", "s": "short", "i": "int"}


def _short_name(symbol: str) -> str:
    """``add_layer_norm_fwd_kernel<bfloat16, 24>`` from the mangled name."""
    name = re.search(r"\d([a-z][a-z_]*_kernel)(I.*?E)?Ev?", symbol)
    assert name, symbol
    arguments = re.findall(r"(6__half|13__nv_bfloat16|[fsi])|L[ib](\d+)E", (name[2] or "")[1:])
    words = [TYPES.get(mangled, number) for mangled, number in arguments]
    return f"{name[1]}<{', '.join(words)}>" if words else name[1]


def _cuobjdump() -> str | None:
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")
