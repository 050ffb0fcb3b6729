"""Time whole models: ``python bench/model.py [--task inference|training|pretraining|memory]``.

BERT with random weights, Hugging Face (eager, SDPA, torch.compile around SDPA) beside the same
model under ``fastbert.accelerate`` and, on a GPU, fastbert's own in CUDA graphs and in int8. Tokens
are real ones: padding is the peers' work, not output.
Each shape's candidates take turns in one process; memory is measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import masked_lm  # noqa: E402
from masked_lm import Shape  # noqa: E402
from problem import found, lengths_of  # noqa: E402
from timing import ceilings, interleave, machine, peak_bytes, write  # noqa: E402

import fastbert  # noqa: E402
from fastbert import device  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shapes(where: str) -> list[Shape]:
    if where == "cuda":
        return [
            Shape("B1 S128", 1, 128),
            Shape("B256 S128", 256, 128),
            Shape("B64 S512", 64, 512),
            Shape("B128 mixed 8-512", 128, 512, "ragged"),
            Shape("B128 wikipedia 512", 128, 512, "wikipedia"),
        ]
    return [
        Shape("B1 S16", 1, 16),
        Shape("B1 S128", 1, 128),
        Shape("B8 S128", 8, 128),
        Shape("B32 mixed 8-256", 32, 256, "ragged"),
    ]


def make_batch(shape: Shape, where: str) -> tuple[dict[str, torch.Tensor], int]:
    """Padded inputs as a tokenizer would give them, and the number of real tokens."""
    lengths = lengths_of(shape.kind, shape.sequences, shape.longest)
    width = max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (shape.sequences, width), generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: x.to(where) for name, x in batch.items()}, sum(lengths)


def build(name: str, model: str, attention: str, where: str, dtype: torch.dtype, size: str) -> Any:
    """A Hugging Face BERT of class ``model`` with random weights, the same ones every time."""
    import transformers

    layers, hidden, heads, inner = masked_lm.SIZES[size]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        attn_implementation=attention, num_labels=3, num_hidden_layers=layers, hidden_size=hidden,
        num_attention_heads=heads, intermediate_size=inner,
    )  # fmt: skip
    module = getattr(transformers, model)(config).to(device=where, dtype=dtype)
    return fastbert.accelerate(module) if name == "fastbert" else module


_MODES = {"torch.compile": None, "torch.compile, reduce-overhead": "reduce-overhead"}


def candidates(
    model: str, where: str, dtype: torch.dtype, peers: list[str], size: str = "base"
) -> dict[str, Any]:
    """name -> module: ours and the named peers, all with the same weights."""
    made = {}
    for name in ("fastbert", *peers):
        attention = "eager" if name == "HF eager" else "sdpa"
        module = build(name, model, attention, where, dtype, size)
        if name in _MODES:
            module = torch.compile(module, dynamic=False, mode=_MODES[name])
        made[name] = module
    return made


def _others(
    size: str, where: str, dtype: torch.dtype, batch: dict[str, torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """More of ours, and int8 peers: name -> call that gives the hidden states. Only on a GPU."""
    if where != "cuda":
        return {}
    plain = build("HF", "BertModel", "sdpa", where, dtype, size).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        own = fastbert.BertModel.from_pretrained(folder, dtype=dtype).to(where).eval()
    packed = fastbert.PackedBatch.from_padded(
        batch["input_ids"].cpu(), batch["attention_mask"].cpu()
    )
    packed, recorded = packed.to(where), fastbert.graphs(own)
    calls = {"fastbert, graphs": lambda: recorded(packed).last_hidden_state}
    if dtype != torch.bfloat16:
        return calls
    int8 = fastbert.quantize(plain.float().cpu()).to(where)
    calls["fastbert, int8"] = lambda: int8(**batch).last_hidden_state
    quantize, config = (
        found(f"torchao.quantization:{name}")
        for name in ("quantize_", "Int8DynamicActivationInt8WeightConfig")
    )
    if quantize is not None and config is not None:
        peer = build("HF", "BertModel", "sdpa", where, dtype, size).eval()
        quantize(peer, config())
        peer = torch.compile(peer, dynamic=False)
        calls["torchao int8, compiled"] = lambda: peer(**batch).last_hidden_state
    return calls


def inference(
    shape: Shape, where: str, dtype: torch.dtype, peers: list[str], seconds: float, size: str
) -> Any:
    """Median latency and real tokens a second of the bare encoder under inference_mode."""
    batch, tokens = make_batch(shape, where)
    models = candidates("BertModel", where, dtype, peers, size)
    for module in models.values():
        module.eval()

    def run(module: Any) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: module(**batch).last_hidden_state)

    runs = {name: run(module) for name, module in models.items()}
    _assert_close({name: call() for name, call in runs.items()}, batch, dtype)
    broken = {}
    for name, call in _try_others(size, where, dtype, batch, broken).items():
        runs[name] = torch.inference_mode()(call)
    row = _row(interleave(runs, where, seconds), tokens)
    return row | ({"left_out": broken} if broken else {})


def _try_others(
    size: str,
    where: str,
    dtype: torch.dtype,
    batch: dict[str, torch.Tensor],
    broken: dict[str, str],
) -> dict[str, Callable[[], torch.Tensor]]:
    """``_others`` that run; in ``broken`` why the rest do not."""
    usable = {}
    try:
        others = _others(size, where, dtype, batch)
    except Exception as error:
        broken["others"] = f"{type(error).__name__}: {error}"
        return {}
    for name, call in others.items():
        try:
            with torch.inference_mode():
                call()
            usable[name] = call
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return usable


def pretraining(
    shape: Shape, where: str, dtype: torch.dtype, peers: list[str], seconds: float, size: str
) -> Any:
    """Median time of a masked-LM step (see bench/masked_lm.py), the share of the matrix rate that
    its products are, and the peak of memory. ours: "fastbert", the last of masked_lm.STEPS."""
    batch = masked_lm.make_batch(shape, where)
    names = {"fastbert": "+ graphs", "HF eager": "HF eager", "HF SDPA": "+ SDPA"}
    runs, broken, peak = {}, {}, {}
    for name in ("fastbert", *peers):
        try:
            run = masked_lm.step_of(names.get(name, name), size, batch, where, dtype)
            run()
            if where == "cuda":
                peak[name] = peak_bytes(run) / 2**20
            runs[name] = run
        except Exception as error:
            if name == "fastbert":
                raise
            broken[name] = f"{type(error).__name__}: {error}"
    row = _row(interleave(runs, where, seconds), batch.tokens)
    for name, candidate in row["candidates"].items():
        work = masked_lm.flops(size, batch.lengths)
        candidate["gflop_s"] = work / candidate["median_ms"] / 1e6
        if name in peak:
            candidate["peak_mib"] = peak[name]
    return row | ({"left_out": broken} if broken else {})


def _assert_close(
    outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Outputs at real tokens agree with Hugging Face's, or there is no speed to speak of."""
    real = batch["attention_mask"].bool()
    peer = next(x for name, x in outputs.items() if name.startswith("HF"))[real].float()
    error = float((outputs["fastbert"][real].float() - peer).abs().max())
    bound = 1e-4 if dtype == torch.float32 else 0.15
    if not error <= bound:
        raise SystemExit(f"parity: outputs differ by {error}, more than {bound}; nothing is timed")


def training(
    shape: Shape, where: str, dtype: torch.dtype, peers: list[str], seconds: float, size: str
) -> Any:
    """Median time of a step: forward, backward and fused AdamW of a sequence classifier."""
    batch, tokens = make_batch(shape, where)
    batch["labels"] = torch.arange(shape.sequences, device=where) % 3
    models = candidates("BertForSequenceClassification", where, dtype, peers, size)

    def run(module: Any) -> Callable[[], Any]:
        module.train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            module(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    runs = {name: run(module) for name, module in models.items()}
    return _row(interleave(runs, where, seconds), tokens)


def _row(timings: dict[str, Any], tokens: int) -> dict[str, Any]:
    rows = {
        name: {
            "median_ms": t.median * 1e3,
            "spread_percent": t.spread_percent,
            "tokens_per_s": tokens / t.median,
            "calls": t.calls,
        }
        for name, t in timings.items()
    }
    peers = {n: row["median_ms"] for n, row in rows.items() if not n.startswith("fastbert")}
    best = min(peers, key=peers.__getitem__)
    ours = rows["fastbert"]["median_ms"]
    speedups = {name: peer / ours for name, peer in peers.items()}
    return {"candidates": rows, "best_peer": best, "speedup": peers[best] / ours, "over": speedups}


_MEMORY = ("HF SDPA", "fastbert, skip_logits", "fastbert native")


def memory_of(name: str, where: str) -> dict[str, float]:
    """Peak bytes of two MLM training steps, B 8 S 128, fp32, above parameters and gradients."""
    shape = Shape("B8 S128", 8, 128)
    batch, _ = make_batch(shape, where)
    labels = torch.full_like(batch["input_ids"], -100)
    chosen = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    labels[chosen.to(where)] = batch["input_ids"][chosen.to(where)]
    if name == "fastbert native":
        torch.manual_seed(0)
        module: Any = fastbert.BertForMaskedLM(fastbert.BertConfig.preset("base")).to(where)
    else:
        module = build("HF", "BertForMaskedLM", "sdpa", where, torch.float32, "base")
        if name == "fastbert, skip_logits":
            fastbert.accelerate(module, skip_logits=True)
    module.train()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)  # touched, so that its pages count as there
    gc.collect()
    start = _current_bytes(where)
    _reset_peak(where)
    for _ in range(2):
        module(**batch, labels=labels).loss.backward()
    return {"peak_bytes": _peak_bytes(where) - start}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _current_bytes(where: str) -> int:
    return torch.cuda.memory_allocated() if where == "cuda" else _status_bytes("VmRSS")


def _reset_peak(where: str) -> None:
    if where == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(where: str) -> int:
    return torch.cuda.max_memory_allocated() if where == "cuda" else _status_bytes("VmHWM")


def memory(where: str) -> dict[str, Any]:
    """``memory_of`` every candidate, each in its own process, and the ratios to Hugging Face."""
    rows = {}
    for name in _MEMORY:
        command = [sys.executable, __file__, "--memory-of", name, "--device", where]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    base = rows["HF SDPA"]["peak_bytes"]
    for row in rows.values():
        row["percent_of_hf"] = 100 * row["peak_bytes"] / base
    return rows


_TASKS = {"inference": inference, "training": training, "pretraining": pretraining}


def main() -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=(*_TASKS, "memory"), action="append")
    parser.add_argument("--size", choices=masked_lm.SIZES, action="append", help="default: base")
    parser.add_argument("--until", type=float, help="start no shape after so many seconds")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--dtype", choices=_DTYPES, action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--peer", action="append", help="default: HF eager, HF SDPA, torch.compile")
    parser.add_argument("--seconds", type=float, default=30.0, help="per shape")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=_MEMORY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    where = args.device or ("cuda" if device.cuda_reason() is None else "cpu")
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, where)))
        return 0
    tasks = args.task or ["inference", "training", "memory"]
    sizes = args.size or ["base"]
    dtypes = args.dtype or list(_DTYPES)
    peers = args.peer or ["HF eager", "HF SDPA", "torch.compile"]
    path = args.out or Path(__file__).parent / "results" / f"model_{where}.json"
    result = _earlier(path) | {"machine": machine()}
    for dtype in dtypes:
        if tasks != ["memory"]:
            result["ceilings"][dtype] = ceilings(where, _DTYPES[dtype])
        for task, size, shape in itertools.product(tasks, sizes, shapes(where)):
            if task == "memory" or args.shape not in shape.name:
                continue
            if args.until and time.perf_counter() - started > args.until:
                result["cut_off"] = f"after {args.until:.0f} s, before {task} {size} {shape.name}"
                continue
            torch.compiler.reset()
            row = {"task": task, "shape": shape.name, "dtype": dtype, "device": where}
            row |= {"size": size} if size != "base" else {}
            try:
                row |= _TASKS[task](shape, where, _DTYPES[dtype], peers, args.seconds, size)
            except torch.cuda.OutOfMemoryError as error:  # the other shapes still count
                print(f"{task} {size} {shape.name} {dtype}: {error}", file=sys.stderr)
                continue
            row["commit"] = result["machine"]["commit"]
            result["rows"] = [r for r in result["rows"] if _key(r) != _key(row)] + [row]
            result["rows"].sort(key=_key)
            print(_line(row), flush=True)
            write(path, result)
            gc.collect()
            if where == "cuda":
                torch.cuda.empty_cache()
    if "memory" in tasks:
        result["memory"] = memory(where)
        for name, row in result["memory"].items():
            size, percent = row["peak_bytes"] / 2**20, row["percent_of_hf"]
            print(f"MLM step, peak memory: {name:<24}{size:8.0f} MiB {percent:5.0f}% of HF")
        write(path, result)
    print(f"wrote {path}")
    return 0


def _earlier(path: Path) -> dict[str, Any]:
    """What ``path`` holds: a run replaces the rows that it measures and leaves the others."""
    empty: dict[str, Any] = {"ceilings": {}, "rows": []}
    return empty | json.loads(path.read_text()) if path.exists() else empty


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["task"], row.get("size", "base"), row["dtype"], row["shape"]


def _line(row: dict[str, Any]) -> str:
    ours = row["candidates"]["fastbert"]
    over = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["over"].items())
    return (
        f"{row['task']:<12}{row['shape']:<19}{row['dtype']:<5}{ours['median_ms']:>9.1f} ms "
        f"±{ours['spread_percent']:.0f}%{ours['tokens_per_s']:>9.0f} tok/s  {over}"
    )


if __name__ == "__main__":
    sys.exit(main())
