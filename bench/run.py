"""Time every op against its peers: ``python bench/run.py [--op attention] [--case dense]``.

Runs each case's parity first and prints no speed-up where it fails. Results are JSON, with the
machine, the versions and the ceilings measured in the same run; ``bench/report.py`` makes the
README's tables. A run replaces the rows that it measures in its JSON, and leaves the others.

Times on a GPU are its own: it waits while the host launches the call. Where a call can be recorded
as a CUDA graph it is also timed as a replay, and two that both can are compared by their replays.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import cases  # noqa: E402
from problem import Case, Problem, Run  # noqa: E402
from timing import (  # noqa: E402
    ceilings,
    earlier,
    interleave,
    machine,
    peak_bytes,
    product_rates,
    replay_of,
    write,
)

from fastbert import device  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(case: Case, where: str, dtype: str, ceiling: dict[str, float], seconds: float) -> Any:
    """One result row, or its failure: parity, then the timings of ours and of every peer."""
    torch.manual_seed(0)
    problem = case.make(where, _DTYPES[dtype])
    row: dict[str, Any] = {"op": case.op, "case": case.name, "device": where, "dtype": dtype}
    found = dataclasses.asdict(problem.check())
    row["error_over_bound"] = found.pop("over_bound")
    row["errors"] = {name: value for name, value in found.items() if value is not None}
    row |= {"facts": problem.facts} if problem.facts else {}
    if not row["error_over_bound"] <= 1.0:
        row["failed"] = "parity: the error is over 2x torch's own; no speed is reported"
        return row
    row["deterministic"] = _same_bits(problem.ours)
    wrong, row["left_out"] = _wrong(problem)
    row |= {"wrong": wrong} if wrong else {}
    others = {n: run for n, run in problem.others.items() if n not in wrong | row["left_out"]}
    usable, broken = _usable({**others, **problem.peers})
    row["left_out"] |= broken
    runs = {"fastbert": problem.ours, **usable}
    timings = interleave(runs, where, seconds, lead=True)
    row["candidates"] = {
        name: {
            "median_us": t.median * 1e6,
            "spread_percent": t.spread_percent,
            "calls": t.calls,
        }
        for name, t in timings.items()
    }
    for name in others.keys() & usable.keys():
        row["candidates"][name]["deterministic"] = _same_bits(usable[name])
    if where == "cuda":
        _on_a_gpu(row["candidates"], runs, problem.half, seconds)
    ours = row["candidates"]["fastbert"]
    row["over"] = {
        name: _ratio(peer, ours)
        for name, peer in row["candidates"].items()
        if name in problem.peers
    }
    if not row["over"]:
        row["failed"] = f"no peer runs: {row['left_out']}"
        return row
    row["best_peer"] = min(row["over"], key=row["over"].__getitem__)
    row["speedup"] = row["over"][row["best_peer"]]
    return row | _shares(problem, ours.get("replay_us", ours["median_us"]) / 1e6, ceiling)


def _ratio(peer: dict[str, float], ours: dict[str, float]) -> float:
    """How many times as long the peer takes: by the replays where both were recorded."""
    by = "replay_us" if "replay_us" in peer and "replay_us" in ours else "median_us"
    return peer[by] / ours[by]


def _shares(problem: Problem, seconds: float, ceiling: dict[str, float]) -> dict[str, float]:
    found = {"bandwidth_gb_s": problem.bytes / seconds / 1e9}
    found["percent_of_copy"] = 100 * found["bandwidth_gb_s"] / ceiling["copy_gb_s"]
    if problem.flops:
        found["gflop_s"] = problem.flops / seconds / 1e9
        found["percent_of_matrix"] = 100 * found["gflop_s"] / ceiling["matrix_gflop_s"]
    # The bound on the time (bench/roofline.py) is that of the ceiling it comes closer to.
    found["percent_of_bound"] = max(found["percent_of_copy"], found.get("percent_of_matrix", 0.0))
    return found


def _same_bits(run: Run) -> bool:
    """Whether two calls give the same tensors; one that updates in place gives none."""
    first, second = (_tensors(run()) for _ in range(2))
    return all(map(torch.equal, first, second))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        wide = outputs.float() if outputs.element_size() == 1 else outputs
        return [wide.detach().clone()]
    return [x for output in outputs or () for x in _tensors(output)]


def _wrong(problem: Problem) -> tuple[dict[str, float], dict[str, str]]:
    """Of the other ways of ours: the error over its bound of those that fail parity, and why those
    that cannot run cannot."""
    wrong, broken = {}, {}
    for name, check in problem.checks.items():
        try:
            found = check().over_bound
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
            continue
        if not found <= 1.0:
            wrong[name] = found
    return wrong, broken


def _usable(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that run here, and why the others do not: a peer that breaks is no failure of
    the case."""
    usable, left_out = {}, {}
    for name, run in runs.items():
        try:
            run()
            usable[name] = run
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return usable, left_out


def _on_a_gpu(candidates: dict[str, Any], runs: dict[str, Run], half: str, seconds: float) -> None:
    """Adds the time of a graph's replay, where a call can be recorded, and the peak of memory.

    A peer's backward alone is never recorded: its forward ran outside the recording, and where that
    kept dropout's counters on the host (memory-efficient SDPA does) the replay would read them
    through a pointer of the device.
    """
    replays: dict[str, Run] = {}
    for name, run in runs.items():
        candidates[name]["peak_mib"] = peak_bytes(run) / 2**20
        if half == "bwd" and not name.startswith("fastbert"):
            continue
        try:
            replays[name] = replay_of(run)
        except Exception as error:
            candidates[name]["not_recorded"] = f"{type(error).__name__}: {error}"
            torch.cuda.synchronize()
    if not replays:
        return
    for name, timing in interleave(replays, "cuda", seconds / 2, lead=True).items():
        candidates[name]["replay_us"] = timing.median * 1e6


def _line(row: dict[str, Any]) -> str:
    head = f"{row['op']:<21}{row['case']:<36}{row['dtype']:<6}"
    if "failed" in row:
        return head + row["failed"]
    ceiling = f"{row['percent_of_copy']:4.0f}% of copy"
    if "gflop_s" in row:
        ceiling = f"{row['percent_of_matrix']:4.0f}% of matrix rate"
    ours = row["candidates"]["fastbert"]
    note = "" if row["deterministic"] else "  not the same bits twice"
    note += f"  wrong: {', '.join(row['wrong'])}" if "wrong" in row else ""
    shown = ours.get("replay_us", ours["median_us"])
    return (
        f"{head}{shown:>10.0f} us ±{ours['spread_percent']:.0f}%"
        f"{row['speedup']:>7.2f}x {row['best_peer']:<24}{ceiling}{note}"
    )


def warm(chosen: list[Case], where: str, dtype: str, until: float) -> None:
    """Compile what the cases will run, into the caches that later processes read."""
    for case in chosen:
        if time.perf_counter() > until:
            return
        with contextlib.suppress(Exception):  # which the run itself will report
            torch.compiler.reset()
            problem = case.make(where, _DTYPES[dtype])
            _usable({"fastbert": problem.ours, **problem.others, **problem.peers})


def _stream(where: str) -> contextlib.AbstractContextManager[Any]:
    """On a GPU a stream that is not the default one, which ``replay_of`` needs."""
    return torch.cuda.stream(torch.cuda.Stream()) if where == "cuda" else contextlib.nullcontext()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", help="only these ops")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--until", type=float, help="start no case after so many seconds")
    parser.add_argument("--dtype", choices=_DTYPES, action="append", help="default: fp32 and bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--out", type=Path, help="JSON file, default bench/results/ops_DEVICE.json")
    parser.add_argument("--warm", action="store_true", help="compile only: time and write nothing")
    args = parser.parse_args()
    started = time.perf_counter()
    where = args.device or ("cuda" if device.cuda_reason() is None else "cpu")
    dtypes = args.dtype or (["bf16", "fp32"] if where == "cuda" else ["fp32", "bf16"])
    chosen = [
        c for c in cases(where) if (args.op is None or c.op in args.op) and args.case in c.name
    ]
    if not chosen:
        parser.error("no case has that --op and --case")
    until = started + (args.until or float("inf"))
    if args.warm:
        for dtype in dtypes:
            warm(chosen, where, dtype, until)
        return 0
    path = args.out or Path(__file__).parent / "results" / f"ops_{where}.json"
    empty: dict[str, Any] = {"ceilings": {}, "products": {}, "rows": [], "cut_off": []}
    result = earlier(path, empty) | {"machine": machine()}
    failed = False
    with _stream(where):
        for dtype in dtypes:
            result["ceilings"][dtype] = ceiling = ceilings(where, _DTYPES[dtype])
            print(
                f"{where} {dtype}: copy {ceiling['copy_gb_s']:.1f} GB/s, "
                f"matrix product {ceiling['matrix_gflop_s']:,.0f} GFLOP/s"
            )
            if where == "cuda" and (args.op is None or "feed_forward" in args.op):
                result["products"][dtype] = rates = product_rates(where, _DTYPES[dtype])
                print({name: round(rate) for name, rate in rates.items()})
            for case in chosen:
                name = f"{case.op} {case.name} {dtype}"
                if name in result["cut_off"]:
                    result["cut_off"].remove(name)
                if time.perf_counter() > until:
                    result["cut_off"].append(name)
                    continue
                row = _measured(case, where, dtype, ceiling, args.seconds)
                row["commit"] = result["machine"]["commit"]
                failed |= "failed" in row or "wrong" in row
                result["rows"] = _replace(result["rows"], row)
                print(_line(row), flush=True)
                write(path, result)  # after each: a run that is cut off leaves what it measured
    write(path, result)
    print(f"wrote {path}")
    return int(failed)


def _measured(
    case: Case, where: str, dtype: str, ceiling: dict[str, float], seconds: float
) -> dict[str, Any]:
    """``measure``; a case that breaks is a result, and the others still count."""
    torch.compiler.reset()  # of a function that many cases call, few shapes are kept
    try:
        return measure(case, where, dtype, ceiling, seconds)
    except Exception as error:
        row = {"op": case.op, "case": case.name, "device": where, "dtype": dtype}
        return row | {"failed": f"{type(error).__name__}: {error}"}
    finally:
        if where == "cuda":
            torch.cuda.empty_cache()


def _replace(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one in its former place, or at the end."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["op"], row["case"], row["dtype"]

    return list(({key(old): old for old in rows} | {key(row): row}).values())


if __name__ == "__main__":
    sys.exit(main())
