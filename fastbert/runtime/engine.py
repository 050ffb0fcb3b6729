"""The whole encoder as one call: the native engine, or its stand-in in numpy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbert import _native, device

Array = np.ndarray


class Tokens(NamedTuple):
    """B sequences end to end, T tokens in total.

    input_ids: (T,) int64, or None with word_rows (T, E) fp32 in place of word embeddings.
    position_ids: (T,) int64.  token_type_ids: (T,) int64, or None for row 0 of that table, if any.
    cu_seqlens: (B + 1,) int32.
    """

    input_ids: Array | None
    position_ids: Array
    token_type_ids: Array | None
    cu_seqlens: Array
    word_rows: Array | None = None


class Engine:
    """An encoder, packed once for the machine; any number of threads may call ``run`` at once.

    config: head_dim, layer_norm_eps, activation ("gelu", "gelu_tanh", "relu" or "silu") and layers:
        which parameters each layer takes ([0] * 12 for an ALBERT).
    tensors: C-contiguous arrays by name, bf16 as uint16. Embedding tables are read in place and so
        may lie in a mapped file; all others are copied.

    Raises ValueError for a tensor that is missing, left over, or of another shape or dtype.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Array]) -> None:
        self._native = _build(config, tensors)
        self.hidden_size: int = self._native.hidden_size
        self.num_layers: int = self._native.num_layers
        self.isa: str = self._native.isa

    def run(
        self,
        tokens: Tokens,
        num_threads: int,
        out: Array | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """The last hidden state (T, H), fp32, written to ``out`` if there is one.

        hidden: (L + 1, T, H) fp32 for the output of the embeddings and of every layer, or None.
        Raises ValueError for ids outside their tables.
        """
        if out is None:
            out = np.empty((len(tokens.position_ids), self.hidden_size), np.float32)
        ids, positions, types, cu_seqlens, word_rows = tokens
        self._native.run(ids, positions, types, cu_seqlens, out, hidden, word_rows, num_threads)
        return out


def _build(config: dict[str, Any], tensors: dict[str, Array]) -> Any:
    try:
        return _native.cpu().Engine(config, tensors)
    except _native.NativeUnavailable as reason:
        import logging

        from fastbert.runtime.reference import ReferenceEngine

        log = logging.getLogger("fastbert")
        log.warning("the encoder runs in numpy, slowly: %s", reason)
        return ReferenceEngine(config, tensors)


def default_threads() -> int:
    """FASTBERT_NUM_THREADS if it is set, else as many as there are cores for this process."""
    forced = device.setting("FASTBERT_NUM_THREADS")
    return int(forced) if forced else device.physical_cores()
