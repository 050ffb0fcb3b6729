"""What ``bench/cpu_peers.py`` times: architectures, shapes, batches, and one model in many formats.

A Source holds one Hugging Face model in fp32 and makes, once, the files that other engines read:
ONNX as exported and with its graph fused, ONNX in int8, OpenVINO in int8.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from masked_lm import Shape
from model_candidates import make_batch

Array = np.ndarray
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CALIBRATION = 64  # sequences that NNCF sees


class Architecture(NamedTuple):
    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Stage -> (out, in) of the Linear that it is."""
        h, i = self.hidden, self.intermediate
        return {"QKV": (3 * h, h), "projection": (h, h), "FFN1": (i, h), "FFN2": (h, i)}

    def linear_ops(self, tokens: int) -> int:
        """Multiplications and additions of all Linears of all layers."""
        return 2 * tokens * self.layers * sum(n * k for n, k in self.linears().values())

    def attention_ops(self, lengths: list[int]) -> int:
        """Multiplications and additions of q·kᵀ and p·v of all layers."""
        return 4 * self.layers * self.hidden * sum(n * n for n in lengths)


BASE = Architecture("BERT-base", 768, 12, 12, 3072)
MINILM = Architecture("MiniLM-L6", 384, 6, 12, 1536)
ARCHITECTURES = {a.name: a for a in (BASE, MINILM)}

CASES: tuple[tuple[Architecture, Shape], ...] = (
    (BASE, Shape("B1 S16", 1, 16)),
    (BASE, Shape("B1 S128", 1, 128)),
    (BASE, Shape("B8 S128", 8, 128)),
    (BASE, Shape("B32 mixed 8-256", 32, 256, "ragged")),
    (MINILM, Shape("B1 S16", 1, 16)),
)


@dataclass(frozen=True)
class Batch:
    """Sequences as a tokenizer pads them: (B, S) int64 arrays, zeros right of each sequence."""

    feed: dict[str, Array]

    @staticmethod
    def of_shape(shape: Shape) -> Batch:
        padded, _ = make_batch(shape, "cpu")
        return Batch.padded([row[row > 0] for row in padded["input_ids"].numpy()])

    @staticmethod
    def padded(sequences: list[Array]) -> Batch:
        ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return Batch(dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True)))

    @property
    def mask(self) -> Array:
        return self.feed["attention_mask"]

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    @property
    def sequences(self) -> list[Array]:
        """Each sequence's own tokens."""
        ids = self.feed["input_ids"]
        return [row[:n] for row, n in zip(ids, self.lengths, strict=True)]

    def torch(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(x) for name, x in self.feed.items()}

    def real(self, hidden: Array) -> Array:
        """(B, S, H) -> (T, H): the rows of real tokens."""
        return np.ascontiguousarray(hidden[self.mask.astype(bool)])


class Source:
    """One bare BERT in fp32, and the files made of it, kept in ``folder``: those of other engines
    for as long as the folder lasts.

    sequences: what NNCF calibrates on; None: random token ids.
    """

    def __init__(
        self, module: Any, folder: Path, threads: int, sequences: list[Array] | None = None
    ) -> None:
        self.module = module.eval()
        self.folder = folder
        self.threads = threads
        self._sequences = sequences
        self._saved: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def random(architecture: Architecture, folder: Path, threads: int) -> Source:
        """Random weights, the same ones every time."""
        import transformers

        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=architecture.hidden,
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            intermediate_size=architecture.intermediate,
            attn_implementation="sdpa",
        )
        module = transformers.BertModel(config, add_pooling_layer=False)
        return Source(module, folder / architecture.name, threads)

    def module_copy(self) -> Any:
        return copy.deepcopy(self.module)

    @cached_property
    def calibration(self) -> list[Batch]:
        """Single sequences, as NNCF takes a transformer's data."""
        sequences = self._sequences
        if sequences is None:
            random = np.random.default_rng(0)
            lengths = random.integers(8, 129, _CALIBRATION)
            sequences = [random.integers(1000, 30000, n) for n in lengths]
        return [Batch.padded([s]) for s in sequences[:_CALIBRATION]]

    def onnx(self) -> Path:
        """As torch exports it. Eager attention by TorchScript: what the optimiser below knows."""

        def write(path: Path) -> None:
            module = self.module_copy()
            module.set_attn_implementation("eager")
            example = Batch.padded([np.arange(1, 9), np.arange(1, 6)]).torch()
            axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, "hidden")}
            with torch.no_grad():
                torch.onnx.export(
                    _Positional(module), tuple(example.values()), str(path), dynamo=False,
                    input_names=list(INPUTS), output_names=["hidden"], dynamic_axes=axes,
                    opset_version=17,
                )  # fmt: skip

        return self._made("model.onnx", write)

    def fused_onnx(self) -> Path:
        """By ONNX Runtime's transformer optimiser; ValueError unless it fused every attention."""
        raw = self.onnx()

        def write(path: Path) -> None:
            from onnxruntime.transformers import optimizer

            config = self.module.config
            fused = optimizer.optimize_model(
                str(raw), "bert", config.num_attention_heads, config.hidden_size, opt_level=0
            )
            count = fused.get_fused_operator_statistics()["Attention"]
            if count != config.num_hidden_layers:
                raise ValueError(
                    f"ONNX Runtime's optimiser fused {count} attentions, expected "
                    f"{config.num_hidden_layers}"
                )
            fused.save_model_to_file(str(path))

        return self._made("fused.onnx", write)

    def int8_onnx(self) -> Path:
        """``quantize_dynamic`` of the fused graph, int8 weights by channel: the faster choice."""
        fused = self.fused_onnx()

        def write(path: Path) -> None:
            import onnx
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                str(fused), str(path), per_channel=True, weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip

        return self._made("int8.onnx", write)

    def int8_openvino(self) -> Path:
        """NNCF's post-training quantisation, by its settings for transformers."""
        raw = self.onnx()

        def write(path: Path) -> None:
            import nncf
            import openvino

            quantized = nncf.quantize(
                openvino.Core().read_model(str(raw)),
                nncf.Dataset([batch.feed for batch in self.calibration]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=_CALIBRATION,
            )
            openvino.serialize(quantized, str(path), str(path.with_name("int8.bin")))

        return self._made("int8.xml", write)

    def fastbert(self, scheme: str) -> Path:
        """Quantised by fastbert, as it is now, and saved for its torch-free runtime."""
        path = self.folder / f"fastbert-{scheme}"
        if scheme not in self._saved:
            import fastbert

            shutil.rmtree(path, ignore_errors=True)
            fastbert.quantize(self.module, scheme=scheme).save_pretrained(path)
            self._saved.add(scheme)
        return path

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        """The file ``name``, written beside its final name if it is not there yet."""
        path = self.folder / name
        if not path.exists():
            partial = path.with_name(f"partial-{name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # exporters warn of what they cannot see
                write(partial)
            os.replace(partial, path)
        return path


class _Positional(torch.nn.Module):
    """The model with positional inputs and one output, as exporters want it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(**dict(zip(INPUTS, inputs, strict=True))).last_hidden_state
