"""Encoder: a saved model on the CPU engine, from texts to vectors, labels, spans; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.runtime import folder as layout
from fastbert.runtime import heads
from fastbert.runtime.engine import Engine, Tokens, default_threads
from fastbert.runtime.heads import Answer, Classification, TaggedToken
from fastbert.runtime.text import Pair, Sequences, TextReader, given_ids

Array = np.ndarray

_BLOCK = 8192  # texts that are tokens at the same time
_BATCH_TOKENS = 4096


class Encoder:
    """A model that ``save_pretrained`` of a quantised model or ``fastbert quantize`` wrote.

    folder: where.  num_threads: None takes FASTBERT_NUM_THREADS, or one a core.
    Any number of threads may use one Encoder at once, and a sequence's result has the same bits
    whatever stands beside it in its batch.
    Raises ValueError, naming the file, for what is missing, cut short, damaged or does not fit.
    """

    def __init__(self, folder: str | Path, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads: got {num_threads}, expected a number from 1, or None")
        self.num_threads = num_threads or default_threads()
        self.saved = layout.read(folder)
        self.facts: dict[str, Any] = self.saved.facts
        arrays = self.saved.encoder_arrays()
        try:
            self._engine = Engine(self.facts["encoder"], arrays)
            self._head = heads.Head(self.facts["head"], self.saved.head_arrays())
        except ValueError as error:
            raise ValueError(f"{self.saved.tensors.path}: {error}") from error
        self._positions = len(arrays["embeddings.position"]) - self.facts["position_offset"]
        self._has_types = "embeddings.token_type" in arrays
        # The engine has packed the Linears; of the file only the tables are read from here on.
        self.saved.tensors.release_after("embeddings.")

    @property
    def hidden_size(self) -> int:
        """H, the width of a vector."""
        return self._engine.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens after which texts are cut, special ones among them."""
        return self.facts["max_length"]

    @property
    def labels(self) -> list[str]:
        """Names of the classes of a classifier's head, in order."""
        return list(self.facts["labels"])

    def encode(
        self,
        texts: Sequence[Any],
        *,
        batch_tokens: int = _BATCH_TOKENS,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        show_progress: bool = False,
    ) -> Array:
        """A vector for each text: (n, H) fp32, in the order of the texts.

        texts: texts, cut after ``max_length`` tokens, or lists of token ids, special ones included.
        batch_tokens: how many tokens run at once, at least one sequence; nothing is padded.
        pooling: "mean" of all tokens, "cls" the first, "max", or "pooler", the model's own on the
            first; None takes what the model was saved with.  An empty sequence gives zeros.
        normalize: to length 1; None takes what the model was saved with.
        prompt: put before each text; None takes the model's default, if it has one.
        """
        pooling = self.facts["pooling"] if pooling is None else pooling
        normalize = self.facts["normalize"] if normalize is None else normalize
        if pooling not in layout.POOLINGS:
            known = ", ".join(layout.POOLINGS)
            raise ValueError(f"pooling: got {pooling!r}, expected one of {known}")
        texts = _listed(texts)
        out = np.zeros((len(texts), self.hidden_size), np.float32)
        with _progress(len(texts), show_progress) as advance:
            for first in range(0, len(texts), _BLOCK):
                sequences = self.tokenize(texts[first : first + _BLOCK], prompt=prompt)
                for index, lengths, x in self.states(sequences, batch_tokens):
                    out[first + index] = self._head.pool(pooling, x, lengths)
                    advance(len(index))
        if normalize:
            out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        return out

    def states(
        self, sequences: Sequences, batch_tokens: int = _BATCH_TOKENS
    ) -> Iterator[tuple[Array, Array, Array]]:
        """(which sequences, their lengths, their tokens' last hidden states (T, H)), longest first.

        The states are valid until the next are asked for.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, expected a number from 1")
        lengths = sequences.lengths
        if len(lengths) and lengths.max() > self._positions:
            raise ValueError(
                f"texts: got a sequence of {lengths.max()} tokens, expected at most "
                f"{self._positions} (the position embeddings of the model)"
            )
        if len(lengths) == 1:
            yield np.zeros(1, np.int64), lengths, self._run_one(sequences)
            return
        order = np.argsort(-lengths, kind="stable")
        rows = min(max(batch_tokens, int(lengths.max(initial=0))), int(lengths.sum()))
        buffer = np.empty((rows, self.hidden_size), np.float32)
        first = 0
        while first < len(order):
            ends = np.cumsum(lengths[order[first:]])
            count = max(1, int(np.searchsorted(ends, batch_tokens, side="right")))
            index = order[first : first + count]
            out = buffer[: lengths[index].sum()]
            yield index, lengths[index], self._run(sequences, index, lengths[index], out)
            first += count

    def _run(self, sequences: Sequences, index: Array, lengths: Array, out: Array) -> Array:
        offsets = np.zeros(len(index) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        types = None
        if self._has_types:
            types = np.concatenate([sequences.types[i] for i in index])
        tokens = Tokens(
            np.concatenate([sequences.ids[i] for i in index]),
            positions + self.facts["position_offset"],
            types,
            offsets.astype(np.int32),
        )
        return self._engine.run(tokens, self.num_threads, out)

    def _run_one(self, sequences: Sequences) -> Array:
        """A single sequence, as a search asks for: what numpy does above for many takes as long as
        a layer of a small model."""
        (ids,) = sequences.ids
        offset = self.facts["position_offset"]
        tokens = Tokens(
            np.ascontiguousarray(ids),
            np.arange(offset, offset + len(ids)),
            np.ascontiguousarray(sequences.types[0]) if self._has_types else None,
            np.array([0, len(ids)], np.int32),
        )
        return self._engine.run(tokens, self.num_threads)

    @cached_property
    def _reader(self) -> TextReader:
        text = self.saved.file(layout.TOKENIZER)
        if text is None:
            raise ValueError(
                f"{self.saved.folder}: was saved without a tokenizer: pass lists of token ids, or "
                "quantise again with tokenizer=…"
            )
        return TextReader(text, self.max_length)

    def tokenize(self, texts: Sequence[Any], *, prompt: str | None = None) -> Sequences:
        """The token ids that ``encode`` makes of texts; lists of token ids stay as they are."""
        if not all(isinstance(text, str) for text in texts):
            return given_ids(texts)
        if prompt is None:
            prompt = self.facts["prompts"].get(self.facts["default_prompt"], "")
        texts = [prompt + text for text in texts]
        if self.facts["lower_case"]:
            texts = [text.lower() for text in texts]
        return self._reader.read(texts)

    def _read_any(self, texts: list[Any]) -> Sequences:
        """Texts or pairs of texts, or token ids as they are."""
        is_text = [isinstance(t, str) or _is_pair(t) for t in texts]
        return self._reader.read(texts) if all(is_text) else given_ids(texts)

    def _needs(self, *tasks: str) -> None:
        task = self.facts["head"]["task"]
        if task not in tasks or self.facts["head"]["steps"] is None:
            raise ValueError(
                f"{self.saved.folder}: holds {self.facts['class']}, expected a model for "
                f"{' or '.join(tasks)}"
            )

    def classify(
        self, texts: Sequence[str | Pair | Sequence[int]], *, batch_tokens: int = _BATCH_TOKENS
    ) -> list[Classification]:
        """The class of each text, pair of texts or list of token ids.

        Scores are a softmax over the classes, for several labels at once each one's own sigmoid,
        and for a regression the numbers themselves.
        Raises ValueError for a model without such a head.
        """
        self._needs("sequence_classification")
        texts = _listed(texts)
        results: dict[int, Classification] = {}
        for first in range(0, len(texts), _BLOCK):
            sequences = self._read_any(texts[first : first + _BLOCK])
            for index, lengths, x in self.states(sequences, batch_tokens):
                logits = self._head.of_sequences(x, lengths)
                found = heads.classified(logits, self.labels, self.facts["problem_type"])
                results.update(zip((first + index).tolist(), found, strict=True))
        return [results[i] for i in range(len(texts))]

    def tag(self, texts: Sequence[str], *, stride: int | None = None) -> list[list[TaggedToken]]:
        """A label for every token of each text, with the characters that it covers.

        stride: tokens that neighbouring windows share, of a text longer than ``max_length``; one in
            two windows takes its label from that where it stands further from an end. None: a
            quarter of a window.
        Raises ValueError for a model without such a head.
        """
        self._needs("token_classification")
        tagged = []
        for text in _listed(texts):
            windows, shared = self._reader.windows(text, stride)
            logits = self._logits_of(windows)
            tagged.append(heads.tagged(text, windows, logits, shared, self.labels))
        return tagged

    def answer(
        self,
        question: str,
        context: str,
        *,
        stride: int | None = None,
        max_answer_tokens: int = 30,
    ) -> Answer:
        """The span of ``context`` that answers ``question`` best.

        stride: tokens of context that neighbouring windows share; None: a quarter of a window.
        Raises ValueError for a model without such a head, and where question and stride leave no
        room for context.
        """
        self._needs("question_answering")
        windows, _ = self._reader.windows((question, context), stride)
        return heads.best_span(context, windows, self._logits_of(windows), max_answer_tokens)

    def _logits_of(self, encodings: list[Any]) -> list[Array]:
        """The head on every token of each encoding: (n, C) each."""
        sequences = Sequences(
            [np.array(e.ids, np.int64) for e in encodings],
            [np.array(e.type_ids, np.int64) for e in encodings],
        )
        logits: dict[int, Array] = {}
        for index, lengths, x in self.states(sequences):
            parts = np.split(self._head.of_tokens(x), np.cumsum(lengths)[:-1])
            logits.update(zip(index.tolist(), parts, strict=True))
        return [logits[i] for i in range(len(encodings))]


def _is_pair(text: Any) -> bool:
    return isinstance(text, list | tuple) and [type(part) for part in text] == [str, str]


def _listed(texts: Any) -> list[Any]:
    if isinstance(texts, str):
        raise ValueError(f"texts: got one text, {texts[:40]!r}, expected a list of texts")
    return list(texts)


class _progress:
    """A bar on stderr that is advanced by what the block calls; nothing unless ``shown``."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("encoding", total=total)

    def __enter__(self) -> Any:
        if self.bar is None:
            return lambda count: None
        self.bar.start()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
