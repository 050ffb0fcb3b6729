"""How benches measure: candidates in turn, medians with spread, ceilings of the same minute."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert import doctor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the 10th and 90th percentile, and how many calls they are of."""

    median: float
    p10: float
    p90: float
    calls: int

    @property
    def spread_percent(self) -> float:
        return 50 * (self.p90 - self.p10) / self.median


def interleave(
    candidates: dict[str, Run], where: str, seconds: float, *, least: int = 3, settle: float = 0.0
) -> dict[str, Timing]:
    """Time every candidate, taking turns, for about ``seconds`` in total and ``least`` rounds.

    Turns are what makes ratios trustworthy on a noisy machine: a slow moment hits all alike. The
    order alternates from round to round, so that no candidate always follows the same one.

    settle: seconds of calls, one at least, that go unmeasured before each measured one. Needed
    where candidates bring thread pools of their own, which spin on after a call, or weights that
    the others' drive from the cache; 0 for none.
    """
    for run in candidates.values():
        run()
        run()
    flush = _flusher(where)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < end and rounds < 1000):
        for name in names if rounds % 2 == 0 else reversed(names):
            settled = time.perf_counter() + settle
            while settle:
                candidates[name]()
                if time.perf_counter() > settled:
                    break
            flush()
            times[name].append(_once(candidates[name], where))
        rounds += 1
    return {name: _timing(samples) for name, samples in times.items()}


def _flusher(where: str) -> Run:
    """A call that leaves the GPU's L2 full of something else, as a whole step would, and the host
    ahead of the device, so that what is timed does not wait for launches; on CPU nothing."""
    if where != "cuda":
        return lambda: None
    size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    numbers = torch.empty(size // 4, dtype=torch.int32, device="cuda")
    return numbers.zero_


def replay_of(run: Run) -> Run:
    """``run`` recorded as a CUDA graph: its time on the device without Python between kernels.

    Raises RuntimeError where it cannot be recorded: it waits for the device, or moves to the host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run: Run) -> int:
    """What one call of ``run`` holds at most on the GPU, above what is there before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _once(run: Run, where: str) -> float:
    if where == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], last + 1
    )


def ceilings(where: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches right now: copy bandwidth and the rate of a big matrix product.

    copy_gb_s counts bytes read plus bytes written; matrix_gflop_s is torch's BLAS on random data.
    """
    numbers = 2**28 if where == "cuda" else 2**24
    source = torch.randn(numbers, device=where).to(dtype)
    target = torch.empty_like(source)
    side = 8192 if where == "cuda" else 1536
    a, b, c = (torch.randn(side, side, device=where).to(dtype) for _ in range(3))
    timings = interleave(
        {"copy": lambda: target.copy_(source), "matrix": lambda: torch.mm(a, b, out=c)},
        where, 1.0, least=7,
    )  # fmt: skip
    return {
        "copy_gb_s": 2 * source.numel() * source.element_size() / timings["copy"].p10 / 1e9,
        "matrix_gflop_s": 2 * side**3 / timings["matrix"].p10 / 1e9,
    }


# Rows, columns, sums of BERT-base's and BERT-large's products at 64k tokens: QKV, attention output,
# up, down, and the decoder over 15% of the tokens.
_PRODUCTS = {
    f"{size}-{name}": (tokens, n, k)
    for size, hidden in (("base", 768), ("large", 1024))
    for name, tokens, n, k in (
        ("qkv", 65536, 3 * hidden, hidden),
        ("output", 65536, hidden, hidden),
        ("up", 65536, 4 * hidden, hidden),
        ("down", 65536, hidden, 4 * hidden),
        ("decoder", 9832, 30528, hidden),
    )
}


def product_rates(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of cuBLAS on BERT's own products: what a kernel around one can hope for."""
    rates = {}
    for name, (m, n, k) in _PRODUCTS.items():
        a, b = (torch.randn(*s, device="cuda").to(dtype) for s in ((m, k), (k, n)))
        c = torch.empty(m, n, dtype=dtype, device="cuda")
        run = torch.no_grad()(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        seconds = interleave({"mm": run}, "cuda", 0.1, least=7)["mm"].median
        rates[name] = 2 * m * n * k / seconds / 1e9
    return rates


def machine() -> dict[str, Any]:
    """Where and with what a result was made."""
    report = doctor.doctor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "versions": report["versions"],
        "cpu": report["cpu"],
        "gpu": report["gpu"],
        "threads": torch.get_num_threads(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON beside its final name, then rename: a broken run leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
