"""What the machine code of every Triton kernel costs: registers, shared memory, spills.

    python bench/triton_resources.py                          # everything, to bench/results/
    python bench/triton_resources.py --arch 90 --dtype bf16   # one architecture and dtype

A run replaces the rows of the cases, architectures and dtypes that it compiles, and leaves the
others. Needs no GPU: the launchers run on CPU tensors of BERT's shapes with Triton's driver
replaced by one that only compiles, so what is compiled is exactly what a launch on that
architecture would compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from triton_launches import BASE_CASES, CASES  # noqa: E402

ARCHITECTURES = (75, 80, 89, 90, 100)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Shared memory that one block may have, by architecture (CUDA C++ Programming Guide, table
# "technical specifications per compute capability").
SHARED_LIMIT = {75: 64 * 1024, 80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What the ops leave to others before sm_80 (the table in fastbert/ops/_registry.py).
NOT_BEFORE_80 = ("feed_forward", "linear_int8", "attention D=256", "attention bias D=256")
RESULTS = Path(__file__).parent / "results" / "triton_resources.json"

MATRIX_INSTRUCTIONS = {
    *("HMMA", "HGMMA", "UTCHMMA", "UTCHMMA2CTA"),
    *("IMMA", "IGMMA", "UTCIMMA"),
    *("QMMA", "QGMMA", "UTCQMMA"),
}


class OfflineDriver:
    """A Triton driver for devices that are not there; device number 90 stands for sm_90."""

    def __init__(self) -> None:
        self.arch = ARCHITECTURES[0]

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


# --- measuring ---------------------------------------------------------------------------------


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _machine_code_facts(cubin: bytes) -> dict[str, Any]:
    """Registers, stack and spill instructions of a kernel, and its widest global accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    matrix = MATRIX_INSTRUCTIONS & {code.split(".")[0] for code in opcodes}

    def widest(prefix: str) -> int:
        bits = [re.search(r"\.(64|128|256)(\.|$)", c) for c in opcodes if c.startswith(prefix)]
        return max((int(found[1]) if found else 32 for found in bits), default=0)

    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"] + numbers["LOCAL"],
        "spill_instructions": sum(code.startswith(("LDL", "STL")) for code in opcodes),
        "load_bits": max(widest("LDG"), widest("LDGSTS")),
        "store_bits": widest("STG"),
        "copy_engine": [code for code in ("UTMALDG", "UTMASTG") if _any(opcodes, code)],
        "matrix_instruction": sorted(matrix)[0] if matrix else None,
    }


def _any(opcodes: list[str], prefix: str) -> bool:
    return any(code.startswith(prefix) for code in opcodes)


def measure(job: tuple[str, int, str]) -> list[dict[str, Any]]:
    """Rows of one (case, architecture, dtype): one for each kernel that the case launches."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from fastbert.kernels import _config

    case, arch, dtype = job
    driver = OfflineDriver()
    driver.arch = arch
    triton.runtime.driver.set_active(driver)
    _config.capability = lambda x: divmod(arch, 10)
    compiled = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        constants = {key: _plain(value) for key, value in kwargs.items() if key.isupper()}
        compiled.append((constants, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        CASES[case](getattr(torch, DTYPES[dtype]))
    finally:
        JITFunction.run = launch
    rows = []
    for constants, kernel in compiled:
        name = kernel.metadata.name.strip("_").removesuffix("_kernel")
        row = {"kernel": name, "case": case, "arch": arch, "dtype": dtype}
        row |= {"constants": constants, "num_warps": kernel.metadata.num_warps}
        row |= {"num_stages": kernel.metadata.num_stages, "shared_bytes": kernel.metadata.shared}
        row |= _machine_code_facts(kernel.asm["cubin"])
        if row not in rows:  # the three tables of an embedding share kernels
            rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """A constant as JSON holds it: a Triton dtype by its name."""
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def sweep(cases: list[str], arches: list[int], dtypes: list[str], jobs: int) -> Iterator[Any]:
    work = [
        (case, arch, dtype)
        for case, arch, dtype in itertools.product(cases, arches, dtypes)
        if arch >= 80 or not case.startswith(NOT_BEFORE_80)
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(measure, work):
            yield from rows


def merged(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of the cases: the new ones, and earlier ones of what was not measured
    again and is still a case."""

    def job(row: dict[str, Any]) -> tuple[str, int, str]:
        return row["case"], row["arch"], row["dtype"]

    again = set(map(job, rows))
    kept = [row for row in earlier if job(row) not in again and row["case"] in CASES]
    place = {case: number for number, case in enumerate(CASES)}
    return sorted(
        kept + rows,
        key=lambda row: (place[row["case"]], row["arch"], list(DTYPES).index(row["dtype"])),
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with one line a kernel: hundreds of rows that a diff should show one by one."""
    head = {name: value for name, value in result.items() if name != "kernels"}
    rows = ",\n  ".join(map(json.dumps, result["kernels"]))
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "kernels": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--base", action="store_true", help="BERT-base cases only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args()
    import triton

    cases = list(CASES)[:BASE_CASES] if args.base else args.case
    rows = []
    print(
        f"{'kernel':28} {'case':31} arch dtype  regs  shared  stack spills "
        "load/store matrix warps constants"
    )
    for row in sweep(cases, args.arch, args.dtype, args.jobs):
        rows.append(row)
        print(
            f"{row['kernel']:28} {row['case']:30} {row['arch']:>4} {row['dtype']:>5} "
            f"{row['registers']:>5} {row['shared_bytes']:>7} {row['stack_bytes']:>6} "
            f"{row['spill_instructions']:>6} {row['load_bits']:>4}/{row['store_bits']:<4} "
            f"{row['matrix_instruction'] or '-':6} {row['num_warps']} {row['constants']}",
            flush=True,
        )
    if args.out.exists():
        rows = merged(json.loads(args.out.read_text(encoding="utf-8"))["kernels"], rows)
    result = {"triton": triton.__version__, "shared_limit": SHARED_LIMIT, "kernels": rows}
    write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
