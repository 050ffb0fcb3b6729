"""Time whole models: ``python bench/model.py [--task inference|training|pretraining|memory]``.

BERT with random weights, Hugging Face (eager, SDPA, torch.compile around SDPA) beside the same
model under ``fastbert.accelerate`` and, on a GPU, fastbert's own in CUDA graphs and in int8. Tokens
are real ones: padding is the peers' work, not output.
Each shape's candidates take turns in one process; memory is measured in a fresh process each. MFU
is of the peak that ``fastbert.train.flops`` knows of the device. A run replaces the rows that it
measures in its JSON, and leaves the others.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

import masked_lm  # noqa: E402
import model_candidates  # noqa: E402
from masked_lm import Shape  # noqa: E402
from model_candidates import Batch, config_of, make_batch  # noqa: E402
from model_memory import memory  # noqa: E402
from timing import ceilings, earlier, interleave, machine, peak_bytes, write  # noqa: E402

import fastbert  # noqa: E402
from fastbert import device  # noqa: E402
from fastbert.train import flops  # noqa: E402

Run = Callable[[], Any]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# ‖ours - theirs‖ / ‖theirs‖ at the real tokens, over 24 layers at most, whose errors add up.
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03}

_modules = functools.cache(model_candidates.candidates)
_encoders = functools.cache(model_candidates.encoders)


class Setting(NamedTuple):
    """What a row is of. seconds: for its timings."""

    shape: Shape
    size: str
    where: str
    dtype: torch.dtype
    peers: tuple[str, ...]
    seconds: float


def shapes(where: str, task: str) -> list[Shape]:
    """First what no run should be without, should its time end."""
    if where == "cuda":
        one = [Shape("B1 S128", 1, 128)] if task == "inference" else []
        return [
            Shape("B256 S128", 256, 128),
            Shape("B64 S512", 64, 512),
            Shape("B128 wikipedia 512", 128, 512, "wikipedia"),
            *one,
            Shape("B128 mixed 8-512", 128, 512, "ragged"),
        ]
    return [
        Shape("B1 S16", 1, 16),
        Shape("B1 S128", 1, 128),
        Shape("B8 S128", 8, 128),
        Shape("B32 mixed 8-256", 32, 256, "ragged"),
    ]


# --- tasks: each makes its calls, which are then timed in turns ----------------------------------


class Work(NamedTuple):
    """runs: name -> call, "fastbert" first.  left_out: why others are not among them.  extra: what
    rows say of each besides its times."""

    runs: dict[str, Run]
    left_out: dict[str, str]
    lengths: list[int]
    flops: int
    extra: dict[str, dict[str, float]]


def inference(at: Setting) -> Work:
    """The bare encoder under inference_mode; error: against the first Hugging Face model's."""
    batch, lengths = make_batch(at.shape, at.where)
    packed = fastbert.PackedBatch.from_padded(
        batch["input_ids"].cpu(), batch["attention_mask"].cpu()
    ).to(at.where)
    calls: dict[str, Run] = {}
    for name, module in _modules("BertModel", at.where, at.dtype, at.peers, at.size).items():
        module.eval()
        calls[name] = lambda module=module: module(**batch).last_hidden_state
    more, left_out = _encoders(at.size, at.where, at.dtype)
    for name, call in more.items():
        calls[name] = lambda call=call: call(batch, packed)
    runs, broken = _that_run({n: torch.inference_mode()(call) for n, call in calls.items()})
    errors = _errors(runs, batch)
    bound = _BOUNDS[at.dtype]
    if not errors.get("fastbert", 0.0) <= bound:
        raise ValueError(f"parity: outputs differ by {errors['fastbert']:.3g}, more than {bound}")
    work = flops.encoder_flops(config_of(at.size), lengths)
    extra = {name: {"error": error} for name, error in errors.items()}
    return Work(runs, left_out | broken, lengths, work, extra)


def training(at: Setting) -> Work:
    """A step: forward, backward and fused AdamW of a sequence classifier."""
    batch, lengths = make_batch(at.shape, at.where)
    batch["labels"] = torch.arange(at.shape.sequences, device=at.where) % 3
    kind = "BertForSequenceClassification"

    def run(module: Any) -> Run:
        module.train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            module(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    modules = _modules(kind, at.where, at.dtype, at.peers, at.size)
    runs, broken = _that_run({name: run(module) for name, module in modules.items()})
    work = flops.TRAINING * flops.encoder_flops(config_of(at.size), lengths)
    return Work(runs, broken, lengths, work, {})


def pretraining(at: Setting) -> Work:
    """A masked-LM step (see bench/masked_lm.py) and its peak of memory.

    ours: "fastbert", the last of masked_lm.STEPS.
    """
    batch = masked_lm.make_batch(at.shape, at.where)
    names = {"fastbert": "+ graphs", "HF eager": "HF eager", "HF SDPA": "+ SDPA"}
    made: dict[str, Run] = {}
    left_out = {}
    for name in ("fastbert", *at.peers):
        try:
            made[name] = masked_lm.step_of(
                names.get(name, name), at.size, batch, at.where, at.dtype
            )
        except Exception as error:
            if name == "fastbert":
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
    runs, broken = _that_run(made)
    extra = {}
    if at.where == "cuda":
        extra = {name: {"peak_mib": peak_bytes(run) / 2**20} for name, run in runs.items()}
    work = masked_lm.flops(at.size, batch.lengths)
    return Work(runs, left_out | broken, batch.lengths, work, extra)


def _that_run(calls: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The calls that run, and why the others do not. Raises what ours does."""
    usable, broken = {}, {}
    for name, call in calls.items():
        try:
            call()
            usable[name] = call
        except Exception as error:
            if name == "fastbert":
                raise
            broken[name] = f"{type(error).__name__}: {error}"
    return usable, broken


def _errors(runs: dict[str, Run], batch: Batch) -> dict[str, float]:
    """‖out - theirs‖ / ‖theirs‖ at the real tokens of every output, theirs that of the first
    Hugging Face model; none where there is no such model."""
    real = batch["attention_mask"].bool()

    def output(run: Run) -> torch.Tensor:
        out = run()
        return (out if out.dim() == 2 else out[real]).float()  # packed as it is

    theirs = next((output(run) for name, run in runs.items() if name.startswith("HF")), None)
    if theirs is None:
        return {}
    norm = theirs.norm()
    return {name: float((output(run) - theirs).norm() / norm) for name, run in runs.items()}


_TASKS = {"inference": inference, "training": training, "pretraining": pretraining}


def measure(task: str, at: Setting, peak_flop_s: float) -> dict[str, Any]:
    """A row of the results."""
    work = _TASKS[task](at)
    tokens = sum(work.lengths)
    rows = {}
    for name, t in interleave(work.runs, at.where, at.seconds).items():
        rows[name] = {
            "median_ms": t.median * 1e3,
            "spread_percent": t.spread_percent,
            "tokens_per_s": tokens / t.median,
            "gflop_s": work.flops / t.median / 1e9,
            "mfu": work.flops / t.median / peak_flop_s,
            "calls": t.calls,
            **work.extra.get(name, {}),
        }
    ours = rows["fastbert"]["median_ms"]
    over = {n: row["median_ms"] / ours for n, row in rows.items() if not n.startswith("fastbert")}
    row: dict[str, Any] = {"candidates": rows, "over": over}
    if over:
        row["best_peer"] = min(over, key=over.__getitem__)
        row["speedup"] = over[row["best_peer"]]
    return row | ({"left_out": work.left_out} if work.left_out else {})


def _warm(task: str, at: Setting) -> None:
    """Compile what the row will run, into the caches that later processes read."""
    try:
        _TASKS[task](at)
    except Exception as error:  # which the run itself will report
        print(f"{task} {at.size} {at.shape.name}: {error}", file=sys.stderr)


def main() -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=(*_TASKS, "memory"), action="append")
    parser.add_argument("--size", choices=masked_lm.SIZES, action="append", help="default: base")
    parser.add_argument("--until", type=float, help="start no shape after so many seconds")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--dtype", choices=_DTYPES, action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--peer",
        choices=(
            "HF eager",
            "HF SDPA",
            model_candidates.OURS_COMPILED,
            *model_candidates.MODES,
            *masked_lm.PEERS[1:],
        ),
        action="append",
        help="default: HF eager, HF SDPA, torch.compile",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="per shape")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warm", action="store_true", help="compile only: time and write nothing")
    args = parser.parse_args()
    where = args.device or ("cuda" if device.cuda_reason() is None else "cpu")
    tasks = args.task or ["inference", "training", "memory"]
    sizes = args.size or ["base"]
    dtypes = args.dtype or list(_DTYPES)
    peers = tuple(args.peer or ["HF eager", "HF SDPA", "torch.compile"])
    path = args.out or Path(__file__).parent / "results" / f"model_{where}.json"
    until = started + (args.until or float("inf"))
    empty: dict[str, Any] = {"ceilings": {}, "rows": [], "cut_off": [], "failed": {}}
    result = earlier(path, empty) | {"machine": machine()}
    failed = False
    for dtype in dtypes:
        if tasks != ["memory"] and not args.warm:
            peak = flops.peak(torch.device(where), "bf16" if dtype == "bf16" else "no")
            result["ceilings"][dtype] = ceilings(where, _DTYPES[dtype]) | {
                "peak_gflop_s": peak.flop_s / 1e9,
                "peak_source": peak.source,
            }
        for task in tasks:
            if task == "memory":
                continue
            _modules.cache_clear()
            _encoders.cache_clear()
            for shape, size in itertools.product(shapes(where, task), sizes):
                if args.shape not in shape.name:
                    continue
                name = f"{task} {size} {shape.name} {dtype}"
                if name in result["cut_off"]:
                    result["cut_off"].remove(name)
                if time.perf_counter() > until:
                    result["cut_off"].append(name)
                    continue
                torch.compiler.reset()
                at = Setting(shape, size, where, _DTYPES[dtype], peers, args.seconds)
                if args.warm:
                    _warm(task, at)
                    continue
                row = {"task": task, "shape": shape.name, "dtype": dtype, "device": where}
                row |= {"size": size} if size != "base" else {}
                try:
                    row |= measure(task, at, peak.flop_s)
                except Exception as error:  # the other shapes still count
                    result["failed"][name] = f"{type(error).__name__}: {error}"
                    print(f"{name}: {result['failed'][name]}", file=sys.stderr)
                    failed = True
                else:
                    result["failed"].pop(name, None)
                    row["commit"] = result["machine"]["commit"]
                    rows = [r for r in result["rows"] if _key(r) != _key(row)] + [row]
                    result["rows"] = sorted(rows, key=_key)
                    print(_line(row), flush=True)
                write(path, result)
                gc.collect()
                if where == "cuda":
                    torch.cuda.empty_cache()
    if args.warm:
        return 0
    if "memory" in tasks:
        result["memory"] = memory(where)
        for name, row in result["memory"].items():
            size, percent = row["peak_bytes"] / 2**20, row["percent_of_hf"]
            print(f"MLM step, peak memory: {name:<24}{size:8.0f} MiB {percent:5.0f}% of HF")
    write(path, result)
    print(f"wrote {path}")
    return int(failed)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["task"], row.get("size", "base"), row["dtype"], row["shape"]


def _line(row: dict[str, Any]) -> str:
    ours = row["candidates"]["fastbert"]
    over = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["over"].items())
    return (
        f"{row['task']:<12}{row.get('size', 'base'):<6}{row['shape']:<19}{row['dtype']:<5}"
        f"{ours['median_ms']:>9.1f} ms ±{ours['spread_percent']:.0f}%"
        f"{ours['tokens_per_s']:>9.0f} tok/s {100 * ours['mfu']:>3.0f}% MFU  {over}"
    )


if __name__ == "__main__":
    sys.exit(main())
