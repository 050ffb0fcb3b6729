"""SentenceEncoder: ``encode`` as sentence-transformers has it, on a saved model."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.runtime.encoder import Encoder

Array = np.ndarray
_log = logging.getLogger("fastbert")

_BATCH_TOKENS = (1024, 16384)  # the least and the most that a batch_size stands for


class SentenceEncoder:
    """Stands where a ``SentenceTransformer`` stood: same calls, same results.

    encoder: an Encoder, or the folder of one. Pooling, normalisation, prompts and longest text are
        those of the sentence-transformers model that it was quantised from.
    """

    def __init__(self, encoder: Encoder | str | Path) -> None:
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)

    @property
    def max_seq_length(self) -> int:
        """Tokens after which texts are cut."""
        return self.encoder.max_length

    @property
    def prompts(self) -> dict[str, str]:
        """Texts to put before a text, by name."""
        return dict(self.encoder.facts["prompts"])

    def get_sentence_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.encoder.hidden_size

    def encode(
        self,
        sentences: str | list[str] | Array,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Vectors of ``sentences``: (n, H), or (H,) for a single text.

        prompt, prompt_name: put before each text, or the name of one of ``prompts``.
        batch_size: of texts; here it only says how many tokens run at once.
        show_progress_bar: None shows one where logging is at INFO or DEBUG.
        output_value: "sentence_embedding", or "token_embeddings": a tensor (n, H) a text.
        convert_to_tensor: a torch tensor; with neither conversion, a list of tensors.
        device: "cpu" or None.  truncate_dim: keep that many first dimensions.
        Raises ValueError for a precision or device that is not here, and for an unknown prompt.
        """
        _check(batch_size, output_value, precision, device)
        single = isinstance(sentences, str)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        if prompt is None and prompt_name is not None:
            if prompt_name not in self.prompts:
                known = ", ".join(self.prompts) or "none"
                raise ValueError(f"prompt_name: got {prompt_name!r}, expected one of: {known}")
            prompt = self.prompts[prompt_name]
        if output_value == "token_embeddings":
            tokens = self._tokens(texts, prompt)
            return tokens[0] if single else tokens
        if show_progress_bar is None:
            show_progress_bar = _log.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        low, high = _BATCH_TOKENS
        vectors = self.encoder.encode(
            texts,
            batch_tokens=min(max(batch_size * self.max_seq_length, low), high),
            normalize=False,
            prompt=prompt,
            show_progress=show_progress_bar,
        )
        if self.encoder.facts["normalize"]:
            vectors = _normalized(vectors)
        vectors = vectors[:, :truncate_dim]
        if normalize_embeddings:
            vectors = _normalized(vectors)
        if convert_to_tensor or not convert_to_numpy:
            tensors = importlib.import_module("torch").from_numpy(vectors)
            if not convert_to_tensor:
                tensors = list(tensors)
            return tensors[0] if single else tensors
        if not texts:
            return np.array([])
        return vectors[0] if single else vectors

    def _tokens(self, texts: list[str], prompt: str | None) -> list[Any]:
        torch: Any = importlib.import_module("torch")
        encoder, found = self.encoder, {}
        for index, lengths, x in encoder.states(encoder.tokenize(texts, prompt=prompt)):
            parts = np.split(x, np.cumsum(lengths)[:-1])
            found.update(
                {int(i): torch.from_numpy(p.copy()) for i, p in zip(index, parts, strict=True)}
            )
        return [found[i] for i in range(len(texts))]


def _normalized(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _check(batch_size: int, output_value: str | None, precision: str, device: Any) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected a number from 1")
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise ValueError(
            f"output_value: got {output_value!r}, expected sentence_embedding or token_embeddings"
        )
    if precision != "float32":
        raise ValueError(f"precision: got {precision!r}, expected float32")
    if device is not None and str(device) != "cpu":
        raise ValueError(
            f"device: got {device!r}, expected cpu: fastbert.runtime is the CPU engine"
        )
