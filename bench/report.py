"""Write the README's generated parts from bench/results: ``python bench/report.py [--check]``.

Between ``<!-- generated: NAME -->`` and ``<!-- end -->`` the README holds nothing typed by hand:
``support`` comes from the table of ops, the others from the JSON of the last committed runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import report_training
from model_candidates import OURS_COMPILED

from fastbert.ops import BACKENDS, OPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpu = machine["gpu"].get("gpu_0")
    cpu, isa = machine["cpu"]["cpu"], machine["cpu"].get("instruction_set")
    where = gpu or f"{cpu}{f' ({isa})' if isa else ''}, {machine['threads']} threads"
    return (
        f"{where}; torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}; {machine['date']}."
    )


def support() -> str:
    """Which backend computes which op, in which dtypes."""

    def cell(op: Any, backend: str) -> str:
        if backend not in op.modules:
            return "–"
        halves = "forward and backward" if "bwd" in op.halves else "yes"
        limit = op.max_size.get(backend)
        halves += f", size ≤ {limit}" if limit else ""
        return halves + (", no bias" if backend in op.no_bias else "")

    names = {"cpp": "C++ (CPU)", "triton": "Triton", "cuda": "CUDA C++", "reference": "torch"}
    rows = [[f"`{op.name}`", *(cell(op, backend) for backend in names)] for op in OPS.values()]
    dtypes = [
        ", ".join(str(d).removeprefix("torch.") for d in BACKENDS[backend].dtypes)
        for backend in names
    ]
    return table(["op", *names.values()], [*rows, ["dtypes", *dtypes]])


def model(path: Path) -> str:
    result = json.loads(path.read_text())
    compiled = any(OURS_COMPILED in row["candidates"] for row in result["rows"])
    rows = []
    for row in result["rows"]:
        ours = row["candidates"]["fastbert"]
        itself = row["candidates"].get(OURS_COMPILED)
        gain = f"{ours['median_ms'] / itself['median_ms']:.2f}×" if itself else "–"
        ratios = [f"{row['over'][n]:.2f}×" if n in row["over"] else "–"
                  for n in ("HF eager", "HF SDPA", "torch.compile")]  # fmt: skip
        cells = [row["task"], row["shape"], row["dtype"], f"{ours['median_ms']:.1f}"]
        rows.append([*cells, f"{ours['tokens_per_s']:,.0f}", *ratios, *([gain] * compiled)])
    headings = ("task", "shape", "dtype", "ms", "real tokens/s", "× HF eager", "× HF SDPA",
                "× torch.compile", *(["torch.compile around ours"] * compiled))  # fmt: skip
    text = table(headings, rows)
    if "memory" in result:
        memory = [
            [name, f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['percent_of_hf']:.0f}%"]
            for name, row in result["memory"].items()
        ]
        text += "\n\n" + table(("MLM training step, B8 S128, fp32", "peak MiB above parameters "
                                "and gradients", "of HF"), memory)  # fmt: skip
    return f"{text}\n\n{_machine(result)}"


def ops(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            rows.append([f"`{row['op']}`", row["case"], row["dtype"], row["failed"], "", "", ""])
            continue
        ours = row["candidates"]["fastbert"]
        unit = "matrix rate" if "gflop_s" in row else "copy"
        percent = row["percent_of_matrix"] if "gflop_s" in row else row["percent_of_copy"]
        shown = ours.get("replay_us", ours["median_us"])
        cells = [f"`{row['op']}`", row["case"], row["dtype"], f"{shown:,.0f}"]
        rows.append(
            [*cells, f"{row['speedup']:.2f}×", row["best_peer"], f"{percent:.0f}% of {unit}"]
        )
    headings = ("op", "case", "dtype", "µs", "× best peer", "best peer", "of the ceiling")
    return f"{table(headings, rows)}\n\n{_machine(result)}"


def cpu_int8(path: Path) -> str:
    """Ours beside the best other engine: latency, older instruction sets, stages, the rest."""
    result = json.loads(path.read_text())
    parts = [_int8_latency(result["rows"])]
    if result["forced"]:
        parts.append(_int8_forced(result["forced"]))
    staged = [row for row in result["rows"] if "stages" in row]
    if staged:
        parts.append(_int8_stages(staged))
    facts = list(_int8_facts(result))
    if facts:
        parts.append(table(("besides", ""), facts))
    peers = ", ".join(f"{name} {version}" for name, version in result["machine"]["peers"].items())
    parts.append(f"{_machine(result)[:-1]}; {peers}.")
    return "\n\n".join(parts)


def _int8_latency(rows: list[dict[str, Any]]) -> str:
    ours = ("fastbert int8", "fastbert int8, torch-free", "fastbert bf16")

    def cells(row: dict[str, Any], name: str) -> list[str]:
        if name not in row["ours"]:
            return ["–", "–"]
        found = row["ours"][name]
        ms = f"{row['candidates'][name]['median_ms']:.1f}"
        return [ms, f"{found['speedup']:.2f}× {found['best_peer']}"]

    lines = []
    for row in rows:
        int8 = row["candidates"].get(ours[0], {})
        tokens, peak = int8.get("tokens_per_s"), int8.get("percent_of_int8_peak")
        lines.append(
            [
                f"{row['architecture']} {row['shape']}",
                *(cell for name in ours for cell in cells(row, name)),
                f"{tokens:,.0f}" if tokens else "–",
                f"{peak:.0f}%" if peak else "–",
            ]
        )
    headings = ("model", "int8, ms", "over", "without torch, ms", "over", "bf16, ms", "over",
                "int8, real tokens/s", "of the int8 peak")  # fmt: skip
    return table(headings, lines)


def _int8_forced(rows: list[dict[str, Any]]) -> str:
    names = ("ONNX Runtime int8", "OpenVINO int8")
    lines = []
    for row in rows:
        over = row["ours"].get("fastbert int8", {"over": {}})["over"]
        ours = row["candidates"].get("fastbert int8")
        ms = f"{ours['median_ms']:.1f}" if ours else "–"
        ratios = [f"{over[name]:.2f}×" if name in over else "–" for name in names]
        lines.append([f"{row['architecture']} {row['shape']}", row["isa"], ms, *ratios])
    headings = ("all held to", "instruction set", "int8, ms", *(f"× {name}" for name in names))
    return table(headings, lines)


def _int8_stages(rows: list[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    names = list(rows[0]["stages"]["stages"])
    for row in rows:
        cells = []
        for name in names:
            found = row["stages"]["stages"][name]
            of = [
                f"{found[f'percent_of_{unit}']:.0f}% of {what}"
                for unit, what in (("int8_peak", "peak"), ("copy", "copy"))
                if f"percent_of_{unit}" in found
            ]
            share = f"{found['percent_of_engine']:.0f}%"
            cells.append(f"{share} ({of[0]})" if of else share)
        lines.append([f"{row['architecture']} {row['shape']}", *cells])
    return table(("time by stage, each timed by itself", *names), lines)


def _int8_facts(result: dict[str, Any]) -> Iterator[list[str]]:
    if "start-up" in result:
        found = result["start-up"]
        yield ["import + load + first vector, without torch", f"{found['total_ms']:.0f} ms"]
    for name, found in result.get("memory", {}).items():
        ratios = f"{found['model_over_weights']:.2f}× ({found['process_over_weights']:.2f}×)"
        yield [f"{name}: resident bytes of the model (the process) over its file's", ratios]
    if "accuracy" in result:
        count = result["accuracy"]["sentences"]
        for name, found in result["accuracy"]["cosine"].items():
            text = f"{found['mean']:.5f} ({found['worst']:.5f})"
            yield [f"{name}: cosine to fp32 over {count:,} sentences, mean (worst)", text]


def accuracy(path: Path) -> str:
    """Scores of the float model and of every scheme on real tasks, and the bars."""
    result = json.loads(path.read_text())
    rows = result["rows"]

    def cell(row: dict[str, Any], scheme: str) -> str:
        text = ", ".join(f"{score:.5g}" for score in row["scores"][scheme].values())
        return text if row["holds"].get(scheme, True) else f"{text} (misses the bar)"

    lines = [[scheme, *(cell(row, scheme) for row in rows)] for scheme in rows[0]["scores"]]
    lines.append(["bar", *(row["bar"] for row in rows)])
    headings = [f"{row['task']}: {', '.join(row['scores']['float'])}" for row in rows]
    return f"{table(('all-MiniLM-L6-v2', *headings), lines)}\n\n{_machine(result)}"


def _trained(name: str) -> Callable[[Path], str]:
    """A table of ``report_training``."""
    return lambda path: getattr(report_training, name)(path, table, _machine)


def sections() -> dict[str, str]:
    made = {"support": support()}
    peers = RESULTS / "cpu_peers.json"
    if peers.exists():
        made["cpu-int8"] = cpu_int8(peers)
    methods = RESULTS / "finetune_methods.json"
    if methods.exists():
        made["finetune-methods"] = _trained("methods")(methods)
    for name, build in (
        ("model", model),
        ("ops", ops),
        ("accuracy", accuracy),
        ("finetune", _trained("finetune")),
        ("pretraining", _trained("pretraining")),
    ):
        for where in ("cpu", "cpu_avx2", "cuda"):
            path = RESULTS / f"{name}_{where}.json"
            if path.exists():
                made[f"{name}-{where.replace('_', '-')}"] = build(path)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """``text`` with every generated section replaced; ValueError for one that nothing generates."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in made:
            raise ValueError(f"README: generated section {name!r}, expected one of {sorted(made)}")
        return f"<!-- generated: {name} -->\n{made[name]}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", one, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is not current")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = fill(old, sections())
    if args.check:
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
