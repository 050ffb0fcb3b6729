"""Time int8 and bf16 inference on a CPU beside its peers: ``python bench/cpu_peers.py``.

One model with random weights under fastbert, torch (dynamic int8, torchao, torch.compile), ONNX
Runtime and OpenVINO, in one process, taking turns; tokens are real ones, and engines that pad do
pad. Every output is first compared with Hugging Face's in fp32. Then: ours and theirs held to older
instruction sets, where the int8 engine's time goes, start-up, memory, accuracy on real weights.
Packages that are not installed (``pip install 'fastbert[bench]'``) are named as not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import peers_probe as probe  # noqa: E402
from model import Shape  # noqa: E402
from peers_engines import ENGINES, INT8, Engine, versions  # noqa: E402
from peers_models import CASES, MINILM, Architecture, Batch, Source  # noqa: E402
from timing import interleave, machine, write  # noqa: E402

from fastbert import _native, device  # noqa: E402

TASKS = ("rows", "forced", "stages", "start-up", "memory", "accuracy")
_LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.99, "int8": 0.95}
# What is held to older instruction sets, and on which shapes: throughput and latency.
_FORCED_ENGINES = (INT8, "ONNX Runtime int8", "OpenVINO int8")
_FORCED_ISAS = ("avx512_vnni", "avx2_vnni", "avx2")
_FORCED_SHAPES = ("BERT-base B1 S128", "BERT-base B8 S128")


def num_threads() -> int:
    """For every engine alike."""
    forced = device.setting("FASTBERT_NUM_THREADS")
    return int(forced) if forced else torch.get_num_threads()


def measure(
    architecture: Architecture,
    shape: Shape,
    source: Source,
    engines: list[Engine],
    seconds: float,
    ceiling: dict[str, Any],
) -> dict[str, Any]:
    """One result row: every engine's median latency, or why there is none, and our ratios."""
    batch = Batch.of_shape(shape)
    tokens = sum(batch.lengths)
    ops = architecture.linear_ops(tokens) + architecture.attention_ops(batch.lengths)
    with torch.inference_mode():
        exact = batch.real(source.module(**batch.torch()).last_hidden_state.numpy())
    runs, candidates, skipped = {}, {}, {}
    for engine in engines:
        skipped[engine.name] = engine.missing()
        if skipped[engine.name] is not None:
            continue
        try:
            loaded = engine.load(source, batch)
            cosine = probe.cosines(loaded.rows(loaded.run()), exact)
        except Exception as error:  # an engine that breaks is a result; the others still count
            skipped[engine.name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        if not cosine.min() >= _LEAST_COSINE[engine.precision]:
            skipped[engine.name] = f"parity: a token's cosine to fp32 is {cosine.min():.4f}"
            continue
        runs[engine.name] = loaded.run
        candidates[engine.name] = {
            "precision": engine.precision,
            "cosine_worst": float(cosine.min()),
            "cosine_mean": float(cosine.mean()),
        }
    for name, timing in interleave(runs, "cpu", seconds, settle=probe.SETTLE).items():
        candidates[name] |= {
            "median_ms": timing.median * 1e3,
            "spread_percent": timing.spread_percent,
            "calls": timing.calls,
            "tokens_per_s": tokens / timing.median,
            "gop_s": ops / timing.median / 1e9,
        }
        if candidates[name]["precision"] == "int8" and ceiling["int8_gop_s"]:
            percent = 100 * candidates[name]["gop_s"] / ceiling["int8_gop_s"]
            candidates[name]["percent_of_int8_peak"] = percent
    return {
        "architecture": architecture.name,
        "shape": shape.name,
        "isa": ceiling["isa"],
        "tokens": tokens,
        "candidates": candidates,
        "not_measured": {name: why for name, why in skipped.items() if why is not None},
        "ours": _ratios(candidates),
    }


def _ratios(candidates: dict[str, Any]) -> dict[str, Any]:
    """Each of ours over every peer and over the best: int8 over all, bf16 over those in float."""
    ours = {engine.name for engine in ENGINES if engine.ours}
    found = {}
    for name in ours & set(candidates):
        mine = candidates[name]
        over = {
            peer: row["median_ms"] / mine["median_ms"]
            for peer, row in candidates.items()
            if peer not in ours and (row["precision"] != "int8" or mine["precision"] == "int8")
        }
        if over:
            best = min(over, key=over.__getitem__)
            found[name] = {"best_peer": best, "speedup": over[best], "over": over}
    return found


def forced_rows(folder: Path, seconds: float, names: list[str], shape: str) -> list[Any]:
    """Rows with every engine held to one instruction set, each set in a process of its own."""
    rows = []
    for isa in _FORCED_ISAS:
        if isa not in _native.cpu().available_isas():
            continue
        environment = {"FASTBERT_CPU_ISA": isa}
        chosen = [name for name in _FORCED_ENGINES if name in names]
        reason = None
        try:
            environment |= probe.mask_environment(isa)
        except RuntimeError as error:
            reason, chosen = str(error), [INT8]
        out = folder / f"forced-{isa}.json"
        command = [sys.executable, __file__, "--task", "rows", "--seconds", str(seconds)]
        command += ["--folder", str(folder), "--out", str(out), "--shape", shape]
        for name in chosen:
            command += ["--engine", name]
        out.unlink(missing_ok=True)
        done = subprocess.run(command, env=os.environ | environment)
        if not out.exists():
            raise RuntimeError(f"the process held to {isa} ended with {done.returncode}, no result")
        for row in json.loads(out.read_text())["rows"]:
            others = {} if reason is None else {n: reason for n in _FORCED_ENGINES if n != INT8}
            rows.append(row | {"not_measured": row["not_measured"] | others})
    return rows


def _real_model(folder: Path, threads: int) -> tuple[Source, Batch] | None:
    """all-MiniLM-L6-v2 and 1,000 sentences of Python's documentation, if they are installed."""
    from fastbert.demo import checkpoint, documentation_texts

    try:
        path = checkpoint()
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        print(f"all-MiniLM-L6-v2: not measured: {error}")
        return None
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text in documentation_texts(4000) if len(text.split()) <= 40][:1064]
    ids = [np.array(x) for x in tokenizer(texts, truncation=True, max_length=64).input_ids]
    module = AutoModel.from_pretrained(path, attn_implementation="sdpa")
    source = Source(module, folder / "all-MiniLM-L6-v2", threads, ids[1000:])
    return source, Batch.padded(ids[:1000])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--shape", default="", help="only those that contain this: 'base B1 S16'")
    parser.add_argument("--engine", "--peer", action="append", help="only these; default: all")
    parser.add_argument("--seconds", type=float, default=30.0, help="per shape")
    parser.add_argument("--folder", type=Path, help="keep the converted models here, for more runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    known = [engine.name for engine in ENGINES]
    names = args.engine or known
    if unknown := set(names) - set(known):
        parser.error(f"--engine: got {sorted(unknown)}, expected some of {known}")
    path = args.out or Path(__file__).parent / "results" / "cpu_peers.json"
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as scratch:
        bench = Bench(path, args.folder or Path(scratch), names, args.seconds, args.shape)
        for task in args.task or TASKS:
            getattr(bench, task.replace("-", "_"))()
    print(f"wrote {path}")
    return int(bench.failed)


class Bench:
    """The tasks, and the result file: a run replaces what it measures and leaves the rest."""

    def __init__(
        self, path: Path, folder: Path, names: list[str], seconds: float, shape: str
    ) -> None:
        self.path, self.folder, self.names = path, folder, names
        self.seconds, self.shape = seconds, shape
        self.threads = num_threads()
        torch.set_num_threads(self.threads)
        self.failed = False
        self.ceiling = probe.measured_ceilings(self.threads)
        empty: dict[str, Any] = {"rows": [], "forced": []}
        self.result = empty | (json.loads(path.read_text()) if path.exists() else {})
        self.result["machine"] = machine() | {"threads": self.threads, "peers": versions()}
        self.result["ceilings"] = self.ceiling
        self._sources: dict[str, Source] = {}
        peak = self.ceiling["int8_gop_s"]
        print(
            f"{self.ceiling['isa']}, {self.threads} threads: copy {self.ceiling['copy_gb_s']:.1f} "
            f"GB/s, int8 peak {'unknown' if peak is None else f'{peak:,.0f} GOP/s'}"
        )

    def _cases(self) -> list[tuple[Architecture, Shape]]:
        return [(a, s) for a, s in CASES if self.shape in f"{a.name} {s.name}"]

    def _source(self, architecture: Architecture) -> Source:
        if architecture.name not in self._sources:
            made = Source.random(architecture, self.folder, self.threads)
            self._sources[architecture.name] = made
        return self._sources[architecture.name]

    def _put(self, group: str, row: dict[str, Any]) -> None:
        """Replace ``row``'s predecessor in a group of rows, in the file too."""
        row["commit"] = self.result["machine"]["commit"]
        kept = [r for r in self.result[group] if _key(r) != _key(row)]
        self.result[group] = sorted([*kept, row], key=_key)
        self._write()

    def _write(self) -> None:
        write(self.path, self.result)

    def rows(self) -> None:
        engines = [engine for engine in ENGINES if engine.name in self.names]
        for architecture, shape in self._cases():
            torch.compiler.reset()
            row = measure(
                architecture, shape, self._source(architecture), engines, self.seconds, self.ceiling
            )
            gc.collect()
            _print(row)
            self.failed |= any(name.startswith("fastbert") for name in row["not_measured"])
            self._put("rows", row)

    def forced(self) -> None:
        for architecture, shape in self._cases():
            name = f"{architecture.name} {shape.name}"
            if name not in _FORCED_SHAPES:
                continue
            for row in forced_rows(self.folder, self.seconds, self.names, name):
                self._put("forced", row)

    def stages(self) -> None:
        for architecture, shape in self._cases():
            source, batch = self._source(architecture), Batch.of_shape(shape)
            found = probe.stages(architecture, source, batch, self.ceiling)
            for row in self.result["rows"]:
                if (row["architecture"], row["shape"]) == (architecture.name, shape.name):
                    row["stages"] = found
            self._write()
            for stage, row in found["stages"].items():
                of = [
                    f"{row[f'percent_of_{name}']:.0f}% of {name.replace('_', ' ')}"
                    for name in ("engine", "int8_peak", "copy")
                    if f"percent_of_{name}" in row
                ]
                head = f"{architecture.name:<11}{shape.name:<17}{stage:<11}"
                print(f"{head}{row['ms']:>9.2f} ms  {', '.join(of)}")

    def start_up(self) -> None:
        real = _real_model(self.folder, self.threads)
        first: Any = "A sentence of average length, as a user would type it."
        source = None if real is None else real[0]
        if source is None:
            source, first = self._source(MINILM), list(range(1000, 1016))
        folder = source.fastbert("int8-dynamic")
        self._report("start-up", probe.start_up(folder, self.threads, first))

    def memory(self) -> None:
        found = {}
        for architecture in dict.fromkeys(a for a, _ in self._cases()):
            folder = self._source(architecture).fastbert("int8-dynamic")
            found[architecture.name] = probe.memory(folder, self.threads)
        self._report("memory", self.result.get("memory", {}) | found)

    def accuracy(self) -> None:
        real = _real_model(self.folder, self.threads)
        if real is not None:
            self._report("accuracy", probe.accuracy(real[0], real[1], self.names))

    def _report(self, name: str, found: dict[str, Any]) -> None:
        print(f"{name}: {json.dumps(found)}")
        self.result[name] = found
        self._write()


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["architecture"], row["shape"], row["isa"]


def _print(row: dict[str, Any]) -> None:
    print(f"{row['architecture']} {row['shape']}, {row['isa']}, {row['tokens']} tokens")
    for name, found in sorted(row["candidates"].items(), key=lambda item: item[1]["median_ms"]):
        ratios = row["ours"].get(name)
        print(
            f"  {name:<26}{found['median_ms']:>9.2f} ms ±{found['spread_percent']:<3.0f}%"
            f"{found['tokens_per_s']:>8.0f} tok/s{found['gop_s']:>6.0f} GOP/s  "
            f"cosine {found['cosine_worst']:.5f}"
            + (f"  {ratios['speedup']:.2f}x {ratios['best_peer']}" if ratios else "")
        )
    for name, why in row["not_measured"].items():
        print(f"  {name:<26}not measured: {why}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
