"""What surrounds ``bench/cpu_peers.py``'s timings: ceilings, stages, start-up, memory, accuracy."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_engines import ENGINES
from peers_models import Architecture, Array, Batch, Source
from timing import ceilings, interleave

from fastbert import _native, ops

_NATIVE = Path(__file__).parent / "native"
SETTLE = 0.1  # seconds: ONNX Runtime's idle threads spin for tens of ms after a call


def cosines(a: Array, b: Array) -> Array:
    """Of each row of a with the same row of b, in fp64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# --- compiled helpers ---------------------------------------------------------------------------


@cache
def _build_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastbert-bench-")


@cache
def compiled(source: str) -> Path:
    """bench/native/``source`` as a shared library; RuntimeError, with the reason, if it fails."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no compiler {compiler}")
    library = Path(_build_folder().name) / f"{Path(source).stem}.so"
    done = subprocess.run(
        [compiler, "-x", "c" if source.endswith(".c") else "c++", "-O2", "-shared", "-fPIC",
         str(_NATIVE / source), "-o", str(library)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"bench/native/{source} does not compile here: {done.stderr[:200]}")
    return library


def mask_environment(isa: str) -> dict[str, str]:
    """The environment in which engines see a CPU of no more than ``isa``.

    RuntimeError, with the reason, where CPUID cannot be masked.
    """
    environment = {"LD_PRELOAD": str(compiled("cpuid_mask.c")), "CPUID_MASK": isa}
    done = subprocess.run([sys.executable, "-c", ""], env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError("the kernel does not let a process mask CPUID here")
    return environment


# --- ceilings -----------------------------------------------------------------------------------


def measured_ceilings(threads: int) -> dict[str, Any]:
    """int8 peak of the instruction set in use, all threads at once, and copy bandwidth."""
    isa = _native.cpu().isa()
    found: dict[str, Any] = {"isa": isa, "threads": threads}
    found["copy_gb_s"] = ceilings("cpu", torch.float32)["copy_gb_s"]
    try:
        library = ctypes.CDLL(str(compiled("int8_peak.cpp")))
    except (RuntimeError, OSError) as reason:
        return found | {"int8_gop_s": None, "int8_how": str(reason)}
    peak = library.int8_peak
    peak.restype, peak.argtypes = ctypes.c_double, [ctypes.c_char_p, ctypes.c_double]
    with ThreadPoolExecutor(threads) as pool:
        rates = list(pool.map(lambda _: peak(isa.encode(), 0.5), range(threads)))
    found["int8_gop_s"] = sum(rates) / 1e9 or None
    found["int8_how"] = f"multiply-adds of {isa} on registers, bench/native/int8_peak.cpp"
    return found


# --- the roofline -------------------------------------------------------------------------------


def stages(
    architecture: Architecture,
    source: Source,
    batch: Batch,
    ceiling: dict[str, Any],
    seconds: float = 4.0,
) -> dict[str, Any]:
    """Where the int8 engine's time goes, each stage against its ceilings.

    The engine fuses across stages, so none can be timed inside it: each is timed by itself, all
    layers in turn. A Linear is _cpu.Linear with every layer's own weights, fp32 in, fp32 out, row
    quantisation included; attention and LN (both of a layer, with residual) are the ops of the
    float models, whose kernels the engine shares. The rest is the engine's time less all of these:
    embeddings, requantisation and calling, less what fusion saves, which can make it negative.
    """
    from fastbert.runtime import Encoder
    from fastbert.runtime.text import given_ids

    tokens = sum(batch.lengths)
    encoder = Encoder(source.fastbert("int8-dynamic"), source.threads)
    sequences = given_ids(batch.sequences)
    alone = {
        stage: _linear_run(stage, architecture, tokens, source.threads)
        for stage in architecture.linears()
    }
    alone["attention"] = _attention_run(architecture, batch)
    alone["LN"] = _norm_run(architecture, tokens)
    runs = {"engine": lambda: next(encoder.states(sequences, tokens)), **alone}
    timings = interleave(runs, "cpu", seconds, settle=SETTLE)
    engine = timings["engine"].median
    rows = {}
    for stage in alone:
        spent = timings[stage].median
        operations, moved = _work(architecture, stage, batch.lengths)
        row = {"ms": spent * 1e3, "percent_of_engine": 100 * spent / engine}
        row["gb_s"] = moved / spent / 1e9
        row["percent_of_copy"] = 100 * row["gb_s"] / ceiling["copy_gb_s"]
        if operations:
            row["gop_s"] = operations / spent / 1e9
        if stage in architecture.linears() and ceiling["int8_gop_s"]:
            row["percent_of_int8_peak"] = 100 * row["gop_s"] / ceiling["int8_gop_s"]
        rows[stage] = row
    rest = engine - sum(timings[stage].median for stage in alone)
    rows["rest"] = {"ms": rest * 1e3, "percent_of_engine": 100 * rest / engine}
    return {"engine_ms": engine * 1e3, "how": " ".join(stages.__doc__.split()), "stages": rows}


def _attention_run(architecture: Architecture, batch: Batch) -> Callable[[], None]:
    lengths, heads = batch.lengths, architecture.heads
    qkv = torch.randn(sum(lengths), 3, heads, architecture.hidden // heads)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)

    @torch.no_grad()
    def run() -> None:
        for _ in range(architecture.layers):
            ops.attention(qkv, cu_seqlens, max(lengths))

    return run


def _norm_run(architecture: Architecture, tokens: int) -> Callable[[], None]:
    x, residual = torch.randn(2, tokens, architecture.hidden)
    weight, bias = torch.randn(2, architecture.hidden)

    @torch.no_grad()
    def run() -> None:
        for _ in range(2 * architecture.layers):
            ops.add_layer_norm(x, residual, weight, bias)

    return run


def _linear_run(
    stage: str, architecture: Architecture, tokens: int, threads: int
) -> Callable[[], None]:
    """All layers' Linears of one stage in turn, each with its own weights."""
    shape = out_features, in_features = architecture.linears()[stage]
    random = np.random.default_rng(0)
    made = [
        _native.cpu().Linear(
            random.integers(-127, 128, shape, np.int8),
            np.full(out_features, 1e-3, np.float32),
            np.zeros(out_features, np.float32),
            None,
            "gelu" if stage == "FFN1" else "none",
        )
        for _ in range(architecture.layers)
    ]
    x = random.standard_normal((tokens, in_features), np.float32)
    y = np.empty((tokens, out_features), np.float32)

    def run() -> None:
        for linear in made:
            linear.run(x, y, threads)

    return run


def _work(architecture: Architecture, stage: str, lengths: list[int]) -> tuple[int, int]:
    """(operations, bytes) of a stage in all layers: weights read once, fp32 read and written."""
    tokens, layers, hidden = sum(lengths), architecture.layers, architecture.hidden
    if stage == "attention":
        return architecture.attention_ops(lengths), layers * tokens * 4 * hidden * 4
    if stage == "LN":  # x and residual in, y out, twice
        return 0, layers * tokens * 2 * 3 * hidden * 4
    n, k = architecture.linears()[stage]
    return 2 * layers * tokens * n * k, layers * (n * k + 4 * tokens * (n + k))


# --- a fresh process: start-up and memory -------------------------------------------------------

_FIRST_VECTOR = """
import json, sys, time
began = time.perf_counter()
from fastbert.runtime import Encoder
imported = time.perf_counter()
encoder = Encoder(sys.argv[1], int(sys.argv[2]))
loaded = time.perf_counter()
vector = encoder.encode([json.loads(sys.argv[3])])
done = time.perf_counter()
assert vector.any() and "torch" not in sys.modules
print(json.dumps({"import_ms": imported - began, "load_ms": loaded - imported,
                  "first_vector_ms": done - loaded, "total_ms": done - began}))
"""

_RESIDENT = """
import json, sys
import numpy as np
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
from fastbert.runtime import Encoder
before = resident()
encoder = Encoder(sys.argv[1], int(sys.argv[2]))
random = np.random.default_rng(0)
for _ in range(3):
    encoder.encode(list(random.integers(1000, 30000, (8, 128))))
print(json.dumps({"model": resident() - before, "process": resident()}))
"""


def _fresh(code: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr[-400:]}")
    return json.loads(done.stdout)


def start_up(folder: Path, threads: int, first: Any, repeats: int = 7) -> dict[str, Any]:
    """Medians over fresh processes: import, load, the first vector. first: a text or token ids.

    process_ms adds the interpreter: from starting it to its end, as a shell would see it.
    """
    rows = []
    for _ in range(repeats):
        start = time.perf_counter()
        row = {k: v * 1e3 for k, v in _fresh(_FIRST_VECTOR, str(folder), str(threads),
                                             json.dumps(first)).items()}  # fmt: skip
        rows.append(row | {"process_ms": (time.perf_counter() - start) * 1e3})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def memory(folder: Path, threads: int) -> dict[str, Any]:
    """Resident bytes after encoding B8 S128 three times, over the bytes of the saved weights.

    model: what loading and running added to a process that had imported everything.
    """
    weights = (folder / "model.safetensors").stat().st_size
    found = _fresh(_RESIDENT, str(folder), str(threads))
    return {
        "weight_bytes": weights,
        "model_bytes": found["model"],
        "process_bytes": found["process"],
        "model_over_weights": found["model"] / weights,
        "process_over_weights": found["process"] / weights,
    }


# --- accuracy on real weights -------------------------------------------------------------------


def accuracy(source: Source, batch: Batch, names: list[str]) -> dict[str, Any]:
    """Cosine of each sentence's mean-pooled vector to Hugging Face's in fp32, by engine."""
    with torch.inference_mode():
        exact = _pooled(batch, batch.real(source.module(**batch.torch()).last_hidden_state.numpy()))
    rows = {}
    for engine in ENGINES:
        if engine.name not in names or engine.missing() or "compile" in engine.name:
            continue
        loaded = engine.load(source, batch)
        found = cosines(_pooled(batch, loaded.rows(loaded.run())), exact)
        rows[engine.name] = {"worst": found.min(), "mean": found.mean()}
    return {"sentences": len(batch.lengths), "cosine": rows}


def _pooled(batch: Batch, rows: Array) -> Array:
    """(T, H) -> (B, H): the mean of each sequence's tokens."""
    sums = np.add.reduceat(rows.astype(np.float64), np.cumsum([0, *batch.lengths[:-1]]), axis=0)
    return sums / np.array(batch.lengths)[:, None]
