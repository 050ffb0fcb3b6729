"""The engines that ``bench/cpu_peers.py`` compares, each behind the same two calls.

An engine's ``load`` takes a Source and a Batch and returns a Loaded: ``run`` is what is timed, one
forward of the batch as a user of that engine would call it, and ``rows`` reads the hidden states of
the real tokens out of what it returned.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peers_models import Array, Batch, Source

from fastbert import device


class Loaded(NamedTuple):
    run: Callable[[], Any]
    rows: Callable[[Any], Array]


@dataclass(frozen=True)
class Engine:
    """precision: fp32, bf16 or int8.  packages: import name -> distribution, all needed."""

    name: str
    precision: str
    load: Callable[[Source, Batch], Loaded]
    packages: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastbert")

    def missing(self) -> str | None:
        """None, or which package is not installed."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def _torch_run(module: Any, batch: Batch) -> Loaded:
    feed = batch.torch()
    run = torch.inference_mode()(lambda: module(**feed).last_hidden_state)
    return Loaded(run, lambda hidden: batch.real(hidden.float().numpy()))


def _eager(source: Source, batch: Batch) -> Loaded:
    return _torch_run(source.module, batch)


def _compiled(dtype: torch.dtype) -> Callable[[Source, Batch], Loaded]:
    def load(source: Source, batch: Batch) -> Loaded:
        return _torch_run(torch.compile(source.module_copy().to(dtype), dynamic=False), batch)

    return load


def _torch_int8(source: Source, batch: Batch) -> Loaded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its removal
        module = torch.ao.quantization.quantize_dynamic(
            source.module_copy(), {torch.nn.Linear}, dtype=torch.qint8
        )
    return _torch_run(module, batch)


def _torchao_int8(source: Source, batch: Batch) -> Loaded:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = source.module_copy()
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _torch_run(torch.compile(module, dynamic=False), batch)


def _onnxruntime(int8: bool) -> Callable[[Source, Batch], Loaded]:
    def load(source: Source, batch: Batch) -> Loaded:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = source.threads
        path = source.int8_onnx() if int8 else source.fused_onnx()
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        feed = {
            x.name: batch.feed[x.name].astype(np.int32 if "int32" in x.type else np.int64)
            for x in session.get_inputs()
        }
        return Loaded(lambda: session.run(None, feed)[0], batch.real)

    return load


def _openvino(precision: str) -> Callable[[Source, Batch], Loaded]:
    def load(source: Source, batch: Batch) -> Loaded:
        import openvino

        core = openvino.Core()
        path = source.int8_openvino() if precision == "int8" else source.onnx()
        model = core.read_model(str(path))
        # Its best case: compiled for this shape alone, and around int8 the faster float, which
        # without AMX is fp32.
        model.reshape({name: list(x.shape) for name, x in batch.feed.items()})
        rest = "bf16" if "amx_bf16" in device.cpu_flags() else "f32"
        hint = {"fp32": "f32", "bf16": "bf16", "int8": rest}[precision]
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": source.threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": hint,
            },
        )
        request = compiled.create_infer_request()

        def run() -> Array:
            request.infer(batch.feed, share_inputs=True)
            return request.get_output_tensor(0).data

        return Loaded(run, batch.real)

    return load


def _fastbert(scheme: str) -> Callable[[Source, Batch], Loaded]:
    def load(source: Source, batch: Batch) -> Loaded:
        import fastbert

        return _torch_run(fastbert.quantize(source.module, scheme=scheme), batch)

    return load


def _torch_free(scheme: str) -> Callable[[Source, Batch], Loaded]:
    def load(source: Source, batch: Batch) -> Loaded:
        from fastbert.runtime import Encoder
        from fastbert.runtime.text import given_ids

        encoder = Encoder(source.fastbert(scheme), source.threads)
        sequences = given_ids(batch.sequences)
        tokens = max(1, sum(batch.lengths))

        def rows(result: Any) -> Array:
            index, lengths, x = result
            parts = dict(zip(index.tolist(), np.split(x, np.cumsum(lengths)[:-1]), strict=True))
            return np.concatenate([parts[i] for i in range(len(parts))])

        return Loaded(lambda: next(encoder.states(sequences, tokens)), rows)

    return load


INT8, BF16, TORCH_FREE = "fastbert int8", "fastbert bf16", "fastbert int8, torch-free"
_ONNX = ("onnx", "onnxruntime")
_OPENVINO = ("onnx", "openvino")

ENGINES = (
    Engine(INT8, "int8", _fastbert("int8-dynamic")),
    Engine(TORCH_FREE, "int8", _torch_free("int8-dynamic")),
    Engine(BF16, "bf16", _fastbert("bf16")),
    Engine("HF SDPA", "fp32", _eager),
    Engine("torch.compile", "fp32", _compiled(torch.float32)),
    Engine("torch.compile bf16", "bf16", _compiled(torch.bfloat16)),
    Engine("torch dynamic int8", "int8", _torch_int8),
    Engine("torchao int8", "int8", _torchao_int8, ("torchao",)),
    Engine("ONNX Runtime", "fp32", _onnxruntime(False), _ONNX),
    Engine("ONNX Runtime int8", "int8", _onnxruntime(True), _ONNX),
    Engine("OpenVINO", "fp32", _openvino("fp32"), _OPENVINO),
    Engine("OpenVINO bf16", "bf16", _openvino("bf16"), _OPENVINO),
    Engine("OpenVINO int8", "int8", _openvino("int8"), (*_OPENVINO, "nncf")),
)


def versions() -> dict[str, str]:
    """The installed versions of the peers' packages."""
    found = {}
    for name in sorted({package for engine in ENGINES for package in engine.packages}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
