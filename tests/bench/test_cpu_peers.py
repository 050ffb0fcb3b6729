"""bench/cpu_peers.py on a model of two layers: what it times, what it refuses to, what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastbert import _native

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)


def _load(name: str) -> ModuleType:
    """A script of bench/, with the scripts that it imports."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "bench"))


bench: Any = _load("cpu_peers")
probe = bench.probe
TINY = bench.Architecture("tiny", 64, 2, 4, 128)
RAGGED = bench.Shape("mixed", 5, 24, "ragged")
CEILING = {"isa": "any", "int8_gop_s": 100.0, "copy_gb_s": 10.0}
ENGINES = {engine.name: engine for engine in bench.ENGINES}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bench.Source.random(TINY, tmp_path_factory.mktemp("models"), THREADS)


def measured(source: Any, *engines: Any, shape: Any = RAGGED) -> dict[str, Any]:
    return bench.measure(TINY, shape, source, list(engines), 0.0, CEILING)


def test_ours_agree_with_fp32_and_are_set_against_the_best_peer(source: Any) -> None:
    names = ("fastbert int8", "fastbert int8, torch-free", "fastbert bf16", "HF SDPA")
    row = measured(source, *(ENGINES[name] for name in (*names, "torch dynamic int8")))
    assert row["not_measured"] == {} and row["tokens"] < 5 * 24
    int8, bf16 = row["ours"]["fastbert int8"], row["ours"]["fastbert bf16"]
    assert set(int8["over"]) == {"HF SDPA", "torch dynamic int8"}
    assert int8["speedup"] == min(int8["over"].values())
    assert set(bf16["over"]) == {"HF SDPA"}  # floats against floats
    found = row["candidates"]["fastbert int8"]
    assert found["cosine_worst"] > 0.99
    assert found["percent_of_int8_peak"] == pytest.approx(found["gop_s"])
    assert "percent_of_int8_peak" not in row["candidates"]["fastbert bf16"]


def test_what_is_wrong_missing_or_broken_is_named_and_not_timed(source: Any) -> None:
    float_engine = ENGINES["HF SDPA"]

    def wrong(source: Any, batch: Any) -> Any:
        loaded = float_engine.load(source, batch)
        return loaded._replace(rows=lambda hidden: -loaded.rows(hidden))

    def broken(source: Any, batch: Any) -> Any:
        raise ValueError("no such operator")

    engines = (
        bench.Engine("wrong", "int8", wrong),
        bench.Engine("broken", "int8", broken),
        bench.Engine("missing", "int8", broken, ("no_such_package",)),
    )
    row = measured(source, float_engine, *engines)
    assert set(row["candidates"]) == {"HF SDPA"} and row["ours"] == {}
    assert row["not_measured"] == {
        "wrong": "parity: a token's cosine to fp32 is -1.0000",
        "broken": "ValueError: no such operator",
        "missing": "not installed: no_such_package",
    }


@pytest.mark.parametrize("name", ["ONNX Runtime", "ONNX Runtime int8", "OpenVINO", "OpenVINO int8"])
def test_other_engines_where_they_are_installed(source: Any, name: str) -> None:
    if reason := ENGINES[name].missing():
        pytest.skip(reason)
    row = measured(source, ENGINES[name])
    assert row["not_measured"] == {} and set(row["candidates"]) == {name}


def test_settled_turns_make_calls_that_are_not_measured() -> None:
    calls = []
    timings = bench.interleave({"a": lambda: calls.append(1)}, "cpu", 0.0, least=4, settle=1e-9)
    assert timings["a"].calls == 4 and len(calls) == 2 + 2 * 4


def test_stages_add_up_to_the_engine(source: Any) -> None:
    found = probe.stages(TINY, source, bench.Batch.of_shape(RAGGED), CEILING, seconds=0.0)
    stages = found["stages"]
    assert list(stages) == ["QKV", "projection", "FFN1", "FFN2", "attention", "LN", "rest"]
    assert sum(row["ms"] for row in stages.values()) == pytest.approx(found["engine_ms"])
    assert stages["FFN1"]["percent_of_int8_peak"] == pytest.approx(stages["FFN1"]["gop_s"])


def test_a_fresh_process_encodes_without_torch(source: Any) -> None:
    folder = source.fastbert("int8-dynamic")
    found = probe.start_up(folder, THREADS, [5, 6, 7], repeats=1)
    parts = [found[name] for name in ("import_ms", "load_ms", "first_vector_ms")]
    assert (
        sum(parts) == pytest.approx(found["total_ms"]) and found["process_ms"] > found["total_ms"]
    )
    held = probe.memory(folder, THREADS)
    assert held["weight_bytes"] > 0 and held["process_bytes"] > held["model_bytes"]


def test_a_sentence_vector_is_the_mean_of_its_own_tokens() -> None:
    batch = bench.Batch.padded([np.array([7, 8, 9]), np.array([5])])
    rows = batch.real(np.arange(12, dtype=np.float32).reshape(2, 3, 2))
    np.testing.assert_array_equal(probe._pooled(batch, rows), [[2, 3], [6, 7]])


def _compiled_or_skip(source: str) -> Path:
    try:
        return probe.compiled(source)
    except RuntimeError as reason:
        pytest.skip(str(reason))


def test_int8_peak_is_that_of_the_instruction_set() -> None:
    _compiled_or_skip("int8_peak.cpp")
    found = probe.measured_ceilings(1)
    assert found["isa"] == _native.cpu().isa() and found["copy_gb_s"] > 0
    assert (found["int8_gop_s"] is None) == (found["isa"] == "portable")


@pytest.mark.parametrize("isa", ["avx2", "avx2_vnni", "avx512", "avx512_vnni"])
def test_a_masked_process_sees_no_newer_instruction_set(isa: str) -> None:
    available = _native.cpu().available_isas()
    if isa not in available:
        pytest.skip(f"this CPU has no {isa}")
    _compiled_or_skip("cpuid_mask.c")
    try:
        environment = probe.mask_environment(isa)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    code = "from fastbert import _native; print(*_native.cpu().available_isas())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = done.stdout.split()
    # AVX-VNNI is no part of plain AVX-512, nor AVX-512 of AVX-VNNI.
    hidden = {"amx"} | ({"avx2_vnni"} if isa == "avx512" else set())
    assert seen == [name for name in available[available.index(isa) :] if name not in hidden]


def test_the_readme_section_has_a_dash_for_what_was_not_measured(tmp_path: Path) -> None:
    report: Any = _load("report")
    ours = {"best_peer": "OpenVINO int8", "speedup": 2.0, "over": {"OpenVINO int8": 2.0}}
    row = {
        "architecture": "BERT-base",
        "shape": "B1 S16",
        "isa": "avx2",
        "candidates": {"fastbert int8": {"median_ms": 4.0, "tokens_per_s": 4000.0}},
        "ours": {"fastbert int8": ours},
    }
    stage = {"percent_of_engine": 40.0, "percent_of_int8_peak": 60.0, "percent_of_copy": 10.0}
    stages = {"stages": {"stages": {"QKV": stage, "rest": {"percent_of_engine": -1.0}}}}
    accuracy = {"sentences": 1000, "cosine": {"fastbert int8": {"worst": 0.998, "mean": 0.999}}}
    machine = {"cpu": {"cpu": "a CPU"}, "gpu": {}, "threads": 2, "date": "2026-01-01"}
    machine |= {"versions": {"torch": "2", "transformers": "5"}, "peers": {"openvino": "2026"}}
    result = {"rows": [row | stages], "forced": [row], "accuracy": accuracy, "machine": machine}
    path = tmp_path / "cpu_peers.json"
    path.write_text(json.dumps(result))
    text = report.cpu_int8(path)
    assert "| BERT-base B1 S16 | 4.0 | 2.00× OpenVINO int8 | – | – | – | – | 4,000 | – |" in text
    assert "| BERT-base B1 S16 | avx2 | 4.0 | – | 2.00× |" in text
    assert "| BERT-base B1 S16 | 40% (60% of peak) | -1% |" in text
    assert "0.99900 (0.99800)" in text and "openvino 2026." in text
