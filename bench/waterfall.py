"""From Hugging Face's BERT to ours, one step at a time: ``python bench/waterfall.py``.

Times a whole masked-LM training step (forward, backward, optimiser) in each of the stages that
``masked_lm.STEPS`` describes, all in one process, taking turns. Prints and writes each stage's
milliseconds, real tokens a second, peak memory, and its ratio to the stage before and to the first.
Each stage is written as soon as it is made, with the time of one step alone (first_ms), so that a
run that is cut off says something of those before.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from masked_lm import SIZES, STEPS, Shape, flops, make_batch, step_of  # noqa: E402
from timing import ceilings, interleave, machine, peak_bytes, write  # noqa: E402

from fastbert import device  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shapes(where: str) -> list[Shape]:
    if where == "cuda":
        return [Shape("B256 S128", 256, 128), Shape("B128 wikipedia 512", 128, 512, "wikipedia")]
    return [Shape("B2 S32", 2, 32), Shape("B4 wikipedia 64", 4, 64, "wikipedia")]


def measure(
    shape: Shape,
    size: str,
    where: str,
    dtype: torch.dtype,
    seconds: float,
    after_each: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """One row a stage, in order; one that fails says so, and ratios skip it.

    after_each: called with the rows so far when a stage has been made and run.
    """
    batch = make_batch(shape, where)
    runs: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in STEPS:
        if name == "+ graphs" and where == "cpu":
            continue
        rows[name] = {"step": name}
        try:
            run = step_of(name, size, batch, where, dtype)
            rows[name]["loss"] = float(run())
            if where == "cuda":
                rows[name]["peak_mib"] = peak_bytes(run) / 2**20
            alone = interleave({name: run}, where, 0.0, least=1)[name]
            rows[name]["first_ms"] = alone.median * 1e3
            runs[name] = run
        except Exception as error:  # the other stages still count
            rows[name]["failed"] = f"{type(error).__name__}: {error}"
        gc.collect()
        after_each(list(rows.values()))
    for name, timing in interleave(runs, where, seconds).items():
        rows[name] |= {
            "median_ms": timing.median * 1e3,
            "spread_percent": timing.spread_percent,
            "tokens_per_s": batch.tokens / timing.median,
            "gflop_s": flops(size, batch.lengths) / timing.median / 1e9,
        }
    timed = [row for row in rows.values() if "median_ms" in row]
    for before, row in zip([timed[0], *timed], timed, strict=False):
        row["over_last"] = before["median_ms"] / row["median_ms"]
        row["over_first"] = timed[0]["median_ms"] / row["median_ms"]
    return list(rows.values())


def agree(rows: list[dict[str, Any]]) -> bool:
    """First losses of random weights, each with dropout of its own, lie close together."""
    found = [row["loss"] for row in rows if "loss" in row]
    return max(found) - min(found) < 0.05 * max(found)


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['step']:<28}{row['failed']}"
    return (
        f"  {row['step']:<28}{row['median_ms']:>9.1f} ms ±{row['spread_percent']:<3.0f}%"
        f"{row['tokens_per_s']:>10,.0f} tok/s{row['over_last']:>7.2f}x{row['over_first']:>7.2f}x"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, help="default: base, on a CPU tiny")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bf16, on a CPU fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    where = args.device or ("cuda" if device.cuda_reason() is None else "cpu")
    size = args.size or ("base" if where == "cuda" else "tiny")
    dtype = args.dtype or ("bf16" if where == "cuda" else "fp32")
    path = args.out or Path(__file__).parent / "results" / f"waterfall_{where}.json"
    result: dict[str, Any] = {"machine": machine(), "size": size, "dtype": dtype, "shapes": {}}
    result["ceilings"] = ceilings(where, _DTYPES[dtype])
    failed = False
    for shape in shapes(where):
        if args.shape not in shape.name:
            continue

        def keep(rows: list[dict[str, Any]], name: str = shape.name) -> None:
            result["shapes"][name] = rows
            write(path, result)

        rows = measure(shape, size, where, _DTYPES[dtype], args.seconds, keep)
        matrix = result["ceilings"]["matrix_gflop_s"]
        for row in rows:
            if "gflop_s" in row:
                row["percent_of_matrix"] = 100 * row["gflop_s"] / matrix
        if not agree(rows):
            print(f"{shape.name}: the losses differ; no times are reported", file=sys.stderr)
            failed = True
            del result["shapes"][shape.name]
            write(path, result)
            continue
        print(f"{size} {dtype} {shape.name}: step, time, over the step before, over the first")
        print("\n".join(map(line, rows)), flush=True)
        failed |= any("failed" in row for row in rows)
        keep(rows)
    print(f"wrote {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
