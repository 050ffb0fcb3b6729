"""QuantizedEncoder: packed tokens to hidden states, on the CPU engine or, on a GPU, by torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastbert import device
from fastbert.compress import torch_path
from fastbert.compress.weights import Arrays, from_bf16
from fastbert.packed import PackedBatch
from fastbert.runtime.engine import Engine, Tokens

Tensor = torch.Tensor

_forced_threads = device.setting("FASTBERT_NUM_THREADS")


class QuantizedEncoder:
    """An encoder for inference; any number of threads may call it at once.

    config, tensors: as ``fastbert.runtime.engine.Engine`` takes them. The engine is built at the
    first call with CPU tensors, copies on a GPU at the first call there.
    watch: called with every batch, if set.
    """

    def __init__(self, config: dict[str, Any], tensors: Arrays) -> None:
        self.config = config
        self.tensors = tensors
        self.watch: Callable[[PackedBatch], None] | None = None
        self._built: dict[torch.device, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what was built is built again there."""
        return {**self.__dict__, "watch": None, "_built": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def max_positions(self) -> int:
        return len(self.tensors["embeddings.position"])

    def __call__(
        self, batch: PackedBatch, want_hidden: bool = False
    ) -> tuple[Tensor, list[Tensor] | None]:
        """The last hidden state, (T, H) fp32, and all L + 1 of them if wanted.

        Under grad mode the results require gradients, so that a backward says what is wrong.
        """
        if self.watch is not None:
            self.watch(batch)
        with torch.no_grad():
            run = self._on_cpu if batch.cu_seqlens.device.type == "cpu" else self._in_torch
            x, hidden = run(batch, want_hidden)
        if torch.is_grad_enabled():
            x = _InferenceOnly.apply(x, torch.zeros((), device=x.device, requires_grad=True))
            hidden = None if hidden is None else [*hidden[:-1], x]
        return x, hidden

    def _on_cpu(self, batch: PackedBatch, want_hidden: bool) -> tuple[Tensor, list[Tensor] | None]:
        cpu = torch.device("cpu")
        engine: Engine = self._get(cpu, lambda: Engine(self.config, self.tensors))
        count, width = batch.num_tokens, engine.hidden_size
        out = torch.empty(count, width)
        hidden = torch.empty(engine.num_layers + 1, count, width) if want_hidden else None
        types = batch.token_type_ids if "embeddings.token_type" in self.tensors else None
        rows = batch.inputs_embeds
        tokens = Tokens(
            _array(batch.input_ids),
            _array(batch.position_ids),
            _array(types),
            batch.cu_seqlens.numpy(),
            None if rows is None else _array(rows.detach().float()),
        )
        threads = int(_forced_threads) if _forced_threads else torch.get_num_threads()
        states = None if hidden is None else hidden.numpy()
        engine.run(tokens, threads, out.numpy(), states)
        return out, None if hidden is None else list(hidden.unbind(0))

    def _in_torch(
        self, batch: PackedBatch, want_hidden: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        where = batch.cu_seqlens.device
        tensors = self._get(
            where, lambda: torch_path.with_column_sums(_copies(self.tensors, where))
        )
        # As in the engine: bf16 between int8 products, and fp32 where the device has no use for it.
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        return torch_path.encode(self.config, tensors, batch, want_hidden, dtype=dtype)

    def _get(self, where: torch.device, build: Callable[[], Any]) -> Any:
        found = self._built.get(where)
        if found is None:
            with self._lock:
                found = self._built.get(where)
                if found is None:
                    found = self._built[where] = build()
        return found


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous().numpy()


def _copies(tensors: Arrays, where: torch.device) -> dict[str, Tensor]:
    return {
        name: (from_bf16(x) if x.dtype == np.uint16 else torch.from_numpy(np.array(x))).to(where)
        for name, x in tensors.items()
    }


class _InferenceOnly(torch.autograd.Function):
    """The identity, and an error in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "a quantised model is for inference and has no gradients: train the float model (see "
            "fastbert.accelerate), then call fastbert.quantize again"
        )
