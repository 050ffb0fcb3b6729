"""Time every op against its peers: ``python bench/run.py [--op attention] [--case dense]``.

Runs each case's parity first and prints no speed-up where it fails. Results are JSON, with the
machine, the versions and the ceilings measured in the same run; ``bench/report.py`` makes the
README's tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case, cases  # noqa: E402
from timing import ceilings, interleave, machine, write  # noqa: E402

from fastbert import device  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(case: Case, where: str, dtype: str, ceiling: dict[str, float], seconds: float) -> Any:
    """One result row, or its failure: parity, then the timings of ours and of every peer."""
    torch.manual_seed(0)
    problem = case.make(where, _DTYPES[dtype])
    row: dict[str, Any] = {"op": case.op, "case": case.name, "device": where, "dtype": dtype}
    row["error_over_bound"] = problem.check()
    if not row["error_over_bound"] <= 1.0:
        row["failed"] = "parity: the error is over 2x torch's own; no speed is reported"
        return row
    timings = interleave({"fastbert": problem.ours, **problem.peers}, where, seconds)
    ours = timings["fastbert"]
    row["candidates"] = {
        name: {
            "median_us": t.median * 1e6,
            "spread_percent": t.spread_percent,
            "calls": t.calls,
        }
        for name, t in timings.items()
    }
    peers = {name: t.median for name, t in timings.items() if name != "fastbert"}
    row["best_peer"] = min(peers, key=peers.__getitem__)
    row["speedup"] = peers[row["best_peer"]] / ours.median
    row["bandwidth_gb_s"] = problem.bytes / ours.median / 1e9
    row["percent_of_copy"] = 100 * row["bandwidth_gb_s"] / ceiling["copy_gb_s"]
    if problem.flops:
        row["gflop_s"] = problem.flops / ours.median / 1e9
        row["percent_of_matrix"] = 100 * row["gflop_s"] / ceiling["matrix_gflop_s"]
    return row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['op']:<21}{row['case']:<36}{row['dtype']:<6}"
    if "failed" in row:
        return head + row["failed"]
    ceiling = f"{row['percent_of_copy']:4.0f}% of copy"
    if "gflop_s" in row:
        ceiling = f"{row['percent_of_matrix']:4.0f}% of matrix rate"
    ours = row["candidates"]["fastbert"]
    return (
        f"{head}{ours['median_us']:>10.0f} us ±{ours['spread_percent']:.0f}%"
        f"{row['speedup']:>7.2f}x {row['best_peer']:<19}{ceiling}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=_DTYPES, action="append", help="default: fp32 and bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--out", type=Path, help="JSON file, default bench/results/ops_DEVICE.json")
    args = parser.parse_args()
    where = args.device or ("cuda" if device.cuda_reason() is None else "cpu")
    dtypes = args.dtype or (["bf16", "fp32"] if where == "cuda" else ["fp32", "bf16"])
    chosen = [
        c for c in cases(where) if (args.op is None or c.op == args.op) and args.case in c.name
    ]
    if not chosen:
        parser.error("no case has that --op and --case")
    rows, ceiling_of = [], {}
    for dtype in dtypes:
        ceiling_of[dtype] = ceiling = ceilings(where, _DTYPES[dtype])
        print(
            f"{where} {dtype}: copy {ceiling['copy_gb_s']:.1f} GB/s, "
            f"matrix product {ceiling['matrix_gflop_s']:,.0f} GFLOP/s"
        )
        for case in chosen:
            try:
                row = measure(case, where, dtype, ceiling, args.seconds)
            except Exception as error:  # a case that breaks is a result; the others still count
                row = {"op": case.op, "case": case.name, "device": where, "dtype": dtype}
                row["failed"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            print(_line(row), flush=True)
    path = args.out or Path(__file__).parent / "results" / f"ops_{where}.json"
    write(path, {"machine": machine(), "ceilings": ceiling_of, "rows": rows})
    print(f"wrote {path}")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
