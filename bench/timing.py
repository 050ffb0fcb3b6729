"""How benches measure: candidates in turn, medians with spread, ceilings of the same minute."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert import doctor

Run = Callable[[], Any]

# Clock ticks that a GPU is kept busy with while the host launches what is timed: a millisecond.
LEAD_TICKS = 2_000_000


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
    candidates: dict[str, Run],
    where: str,
    seconds: float,
    *,
    least: int = 3,
    settle: float = 0.0,
    lead: bool = False,
) -> dict[str, Timing]:
    """Time every candidate, taking turns, for about ``seconds`` in total and ``least`` rounds.

    Turns are what makes ratios trustworthy on a noisy machine: a slow moment hits all alike. The
    order alternates from round to round, so that no candidate always follows the same one.

    settle: seconds of calls, one at least, that go unmeasured before each measured one. Needed
    where candidates bring thread pools of their own, which spin on after a call, or weights that
    the others' drive from the cache; 0 for none.

    lead: the GPU waits while the host launches the call, so that its time is the device's alone, up
    to a millisecond of launches. Without it the host's time counts, as it does for a user's call.
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
            times[name].append(_once(candidates[name], where, lead))
        rounds += 1
    return {name: _timing(samples) for name, samples in times.items()}


def _flusher(where: str) -> Run:
    """A call that leaves the GPU's L2 full of something else, as a step would; on a CPU none."""
    if where != "cuda":
        return lambda: None
    size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    numbers = torch.empty(size // 4, dtype=torch.int32, device="cuda")
    return numbers.zero_


_broken: list[str] = []  # why no more is recorded in this process


def replay_of(run: Run) -> Run:
    """``run`` recorded as a CUDA graph: its time on the device without Python between kernels.

    Needs a current stream that is not the default one, the one on which ``run`` was called before:
    what autograd keeps runs on the stream of its forward pass, which has to be the recording's.
    Raises RuntimeError where it cannot be recorded: it waits for the device, or moves to the host.
    Where that shows too late, in the recording, nothing is recorded from then on.
    """
    if _broken:
        raise RuntimeError(f"a recording broke off before: {_broken[0]}")
    with _no_waiting():
        run()
        run()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            run()
    except Exception as error:
        if not _can_draw():
            _broken.append(f"{type(error).__name__}: {error}")
            _leave_recording(pool)
        raise
    return graph.replay


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Calls that wait for the device raise RuntimeError: before a recording, and not in it, where
    they would invalidate it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _can_draw() -> bool:
    """Whether the generator is out of the recording, as it is unless CUDA invalidated that."""
    try:
        torch.randn(1, device="cuda")
        return True
    except RuntimeError:
        return False


def _leave_recording(pool: Any) -> None:
    """What torch leaves undone where it cannot end a recording: the allocator goes on to serve its
    pool, and the generator takes every draw for one of the recording."""
    here = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(here, pool)
    torch.cuda.default_generators[here].graphsafe_set_state(torch.Generator(f"cuda:{here}"))


def peak_bytes(run: Run) -> int:
    """What one call of ``run`` holds at most on the GPU, above what is there before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _once(run: Run, where: str, lead: bool) -> float:
    if where == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead:
            torch.cuda._sleep(LEAD_TICKS)
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
        where, 1.0, least=7, lead=True,
    )  # fmt: skip
    return {
        "copy_gb_s": 2 * source.numel() * source.element_size() / timings["copy"].p10 / 1e9,
        "matrix_gflop_s": 2 * side**3 / timings["matrix"].p10 / 1e9,
    }


# Rows, columns, sums of BERT-base's and BERT-large's products at 64k tokens: QKV, attention output,
# up, down, and the decoder over 15% of the tokens, also with its vocabulary as it is.
_PRODUCTS = {
    f"{size}-{name}": (tokens, n, k)
    for size, hidden in (("base", 768), ("large", 1024))
    for name, tokens, n, k in (
        ("qkv", 65536, 3 * hidden, hidden),
        ("output", 65536, hidden, hidden),
        ("up", 65536, 4 * hidden, hidden),
        ("down", 65536, hidden, 4 * hidden),
        ("decoder", 9832, 30528, hidden),
        ("decoder-30522", 9832, 30522, hidden),
    )
}


def product_rates(where: str, dtype: torch.dtype, scale: int = 1) -> dict[str, float]:
    """GFLOP/s of torch's BLAS on BERT's own products: what a kernel around one can hope for.

    Of y = x w^T forward, and of its gradients dx = dy w and dw = dy^T x, x (m, k), w (n, k).
    scale: divides the rows.
    """
    rates = {}
    for name, (rows, n, k) in _PRODUCTS.items():
        m = rows // scale
        x, w, dy = (torch.randn(*s, device=where).to(dtype) for s in ((m, k), (n, k), (m, n)))
        runs = {
            name: lambda x=x, w=w: torch.mm(x, w.t()),
            f"{name} dx": lambda w=w, dy=dy: torch.mm(dy, w),
            f"{name} dw": lambda x=x, dy=dy: torch.mm(dy.t(), x),
        }
        for way, timing in interleave(runs, where, 0.1, least=7, lead=True).items():
            rates[way] = 2 * m * n * k / timing.median / 1e9
    return rates


def machine() -> dict[str, Any]:
    """Where and with what a result was made."""
    report = doctor.doctor()
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": report["versions"],
        "cpu": report["cpu"],
        "gpu": report["gpu"],
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """Of this checkout; where the folder is no checkout or git is not there, what COMMIT says."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        found = done.stdout.strip()
    except OSError:
        found = ""
    return found or os.environ.get("COMMIT", "") or "unknown"


def earlier(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """What ``path`` holds, or ``empty``: a run replaces the rows that it measures alone."""
    return empty | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON beside its final name, then rename: a broken run leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
