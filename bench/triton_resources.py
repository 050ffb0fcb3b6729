"""What the machine code of every Triton kernel costs: registers, shared memory, spills.

    python bench/triton_resources.py                          # everything, to bench/results/
    python bench/triton_resources.py --arch 90 --dtype bf16   # one architecture and dtype

Needs no GPU: the launchers run on CPU tensors of BERT's shapes with Triton's driver replaced by one
that only compiles, so what is compiled is exactly what a launch on that architecture would compile.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 89, 90, 100)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Shared memory that one block may have, by architecture (CUDA C++ Programming Guide, table
# "technical specifications per compute capability").
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RESULTS = Path(__file__).parent / "results" / "triton_resources.json"

MATRIX_INSTRUCTIONS = {"HMMA", "HGMMA", "UTCHMMA", "UTCHMMA2CTA", "IMMA", "IGMMA", "UTCIMMA"}

TOKENS, MASKED, VOCABULARY = 8192, 1229, 30522


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


# --- launches: BERT-base unless the name says otherwise ----------------------------------------


def _attention_call(
    dtype: Any, head_dim: int, p: float, bias: bool, longest: int
) -> tuple[Any, tuple[Any, ...]]:
    """qkv and the arguments that follow the tensors in both halves."""
    import torch

    qkv = torch.empty(TOKENS, 3, 768 // head_dim, head_dim, dtype=dtype)
    cu_seqlens = torch.zeros(17, dtype=torch.int32)
    seed = torch.zeros(1, dtype=torch.int64)
    scores = torch.empty(1, TOKENS, 512) if bias else None
    return qkv, (cu_seqlens, longest, head_dim**-0.5, p, seed, 0, scores)


def _attention(dtype: Any, head_dim: int, p: float, bias: bool = False) -> None:
    from fastbert.kernels import attention

    qkv, site = _attention_call(dtype, head_dim, p, bias, 512)
    out, lse = attention.attention_fwd(qkv, *site)
    attention.BACKWARDS["two_kernels"](out, qkv, out, lse, *site)


def _attention_bwd(dtype: Any, way: str, head_dim: int, p: float, bias: bool = False) -> None:
    """One of the backwards in one kernel, where it has a tile."""
    import torch

    from fastbert.kernels import _config, attention

    choose = getattr(_config, f"attention_bwd_{way}")
    arch = _config.capability(torch.empty(0))
    tile = choose(head_dim, dtype.itemsize, p > 0.0, arch, bias)
    if tile is not None:
        longest = tile.block_m if way == "short" else 512
        qkv, site = _attention_call(dtype, head_dim, p, bias, longest)
        out = torch.empty_like(qkv[:, 0])
        lse = torch.empty(qkv.shape[2], TOKENS)
        attention.BACKWARDS[way](out, qkv, out, lse, *site)


def _bias_gelu(dtype: Any, tanh: bool) -> None:
    import torch

    from fastbert.kernels import bias_gelu

    x, bias = torch.empty(TOKENS, 3072, dtype=dtype), torch.empty(3072, dtype=dtype)
    bias_gelu.bias_gelu_fwd(x, bias, tanh)
    bias_gelu.bias_gelu_bwd(x, x, bias, tanh)


def _add_layer_norm(dtype: Any, width: int, p: float) -> None:
    import torch

    from fastbert.kernels import add_layer_norm

    x, vector = torch.empty(TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype)
    dropout = (p, torch.zeros(1, dtype=torch.int64), 0)
    y, z, mean, rstd = add_layer_norm.add_layer_norm_fwd(
        x, x, vector, vector, vector, 1e-12, *dropout, True
    )
    add_layer_norm.add_layer_norm_bwd(y, z, vector, mean, rstd, *dropout, True)


def _embed_layer_norm(dtype: Any, width: int, p: float) -> None:
    import torch

    from fastbert.kernels import embed_layer_norm

    ids = torch.zeros(TOKENS, dtype=torch.int64)
    tables = [torch.empty(rows, width, dtype=dtype) for rows in (VOCABULARY, 512, 2)]
    vector = torch.empty(width, dtype=dtype)
    dropout = (p, torch.zeros(1, dtype=torch.int64), 0)
    y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
        ids, ids, ids, *tables, vector, vector, 1e-12, *dropout
    )
    embed_layer_norm.embed_layer_norm_bwd(y, ids, ids, ids, *tables, vector, mean, rstd, *dropout)


def _cross_entropy_rows(dtype: Any) -> None:
    import torch

    from fastbert.kernels import cross_entropy

    # Rows padded to a multiple of 16 bytes, as the decoder GEMM writes them.
    logits = torch.empty(MASKED, VOCABULARY + 6, dtype=dtype)[:, :VOCABULARY]
    bias, labels = torch.empty(VOCABULARY, dtype=dtype), torch.zeros(MASKED, dtype=torch.int64)
    for grad_scale in (None, torch.ones(1)):
        cross_entropy.cross_entropy_rows(logits, bias, labels, -100, grad_scale)


def _rows(dtype: Any) -> None:
    import torch

    from fastbert.kernels import rows

    x, index = torch.empty(TOKENS, 768, dtype=dtype), torch.zeros(MASKED, dtype=torch.int64)
    rows.scatter_rows(rows.gather_rows(x, index), index, TOKENS)


def _linear_int8(dtype: Any) -> None:
    import torch

    from fastbert.kernels import linear_int8

    weight, weight_scale = torch.empty(3072, 768, dtype=torch.int8), torch.empty(3072)
    for tokens in (TOKENS, 64, 16):
        q, scale, offset = linear_int8.quantize_rows(torch.empty(tokens, 768, dtype=dtype))
        by_column = (weight_scale, offset, weight_scale)
        linear_int8.linear_int8(q, scale, weight, weight_scale, *by_column, 1, dtype)


CASES: dict[str, Callable[[Any], None]] = {
    "attention": partial(_attention, head_dim=64, p=0.0),
    "attention dropout": partial(_attention, head_dim=64, p=0.1),
    "attention short": partial(_attention_bwd, way="short", head_dim=64, p=0.0),
    "attention short dropout": partial(_attention_bwd, way="short", head_dim=64, p=0.1),
    "bias_gelu erf": partial(_bias_gelu, tanh=False),
    "bias_gelu tanh": partial(_bias_gelu, tanh=True),
    "add_layer_norm": partial(_add_layer_norm, width=768, p=0.0),
    "add_layer_norm dropout": partial(_add_layer_norm, width=768, p=0.1),
    "embed_layer_norm dropout": partial(_embed_layer_norm, width=768, p=0.1),
    "cross_entropy_rows": _cross_entropy_rows,
    "rows": _rows,
    "linear_int8 gelu": _linear_int8,
    # Beyond BERT-base.
    "attention D=32 dropout": partial(_attention, head_dim=32, p=0.1),
    "attention D=40 dropout": partial(_attention, head_dim=40, p=0.1),
    "attention D=128": partial(_attention, head_dim=128, p=0.0),
    "attention D=128 dropout": partial(_attention, head_dim=128, p=0.1),
    "attention D=256 dropout": partial(_attention, head_dim=256, p=0.1),
    "attention short D=32": partial(_attention_bwd, way="short", head_dim=32, p=0.0),
    "attention short D=32 dropout": partial(_attention_bwd, way="short", head_dim=32, p=0.1),
    "attention short D=40 dropout": partial(_attention_bwd, way="short", head_dim=40, p=0.1),
    "attention short D=128": partial(_attention_bwd, way="short", head_dim=128, p=0.0),
    "attention short D=128 dropout": partial(_attention_bwd, way="short", head_dim=128, p=0.1),
    "attention bias": partial(_attention, head_dim=64, p=0.0, bias=True),
    "attention bias dropout": partial(_attention, head_dim=64, p=0.1, bias=True),
    "attention bias D=32 dropout": partial(_attention, head_dim=32, p=0.1, bias=True),
    "attention bias D=128 dropout": partial(_attention, head_dim=128, p=0.1, bias=True),
    "attention bias D=256 dropout": partial(_attention, head_dim=256, p=0.1, bias=True),
    "attention short bias": partial(_attention_bwd, way="short", head_dim=64, p=0.0, bias=True),
    "attention short bias dropout": partial(
        _attention_bwd, way="short", head_dim=64, p=0.1, bias=True
    ),
    "attention short bias D=32 dropout": partial(
        _attention_bwd, way="short", head_dim=32, p=0.1, bias=True
    ),
    "attention one pass bias": partial(
        _attention_bwd, way="one_pass", head_dim=64, p=0.0, bias=True
    ),
    "attention one pass bias dropout": partial(
        _attention_bwd, way="one_pass", head_dim=64, p=0.1, bias=True
    ),
    "attention one pass": partial(_attention_bwd, way="one_pass", head_dim=64, p=0.0),
    "attention one pass dropout": partial(_attention_bwd, way="one_pass", head_dim=64, p=0.1),
    "add_layer_norm H=1024 dropout": partial(_add_layer_norm, width=1024, p=0.1),
    "add_layer_norm H=4096 dropout": partial(_add_layer_norm, width=4096, p=0.1),
    "embed_layer_norm H=1024 dropout": partial(_embed_layer_norm, width=1024, p=0.1),
}
BASE_CASES = 11  # the first ones


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
        "matrix_instruction": sorted(matrix)[0] if matrix else None,
    }


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
        constants = {key: value for key, value in kwargs.items() if key.isupper()}
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


def sweep(cases: list[str], arches: list[int], dtypes: list[str], jobs: int) -> Iterator[Any]:
    work = list(itertools.product(cases, arches, dtypes))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(measure, work):
            yield from rows


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
    result = {"triton": triton.__version__, "shared_limit": SHARED_LIMIT, "kernels": rows}
    write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
