"""Chunks of documents to arrays, in processes of their own, in the order in which they came."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastbert.data.encode import Encoded, Encoder
from fastbert.data.reading import Chunk
from fastbert.data.sentences import RawDocument, sentences_of
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.units import Units


class Task(NamedTuple):
    """What to do with documents; every worker is told once.

    tokenizer: a folder.  sentences: see ``sentences_of``.  held_out: see ``is_held_out``.
    phrases: of the units; None for none.
    """

    tokenizer: Path
    sentences: str
    held_out: float
    phrases: list[str] | None


def is_held_out(sentences: list[str], part: float) -> bool:
    """Whether a document belongs to the split ``valid``: ``part`` of all documents do.

    By a hash of its text: 64 bits of BLAKE2b, as a number in [0, 1), below ``part``.
    """
    digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < part * 2**64


class Worker:
    """Encodes documents, apart by split."""

    def __init__(self, task: Task) -> None:
        tokenizer = load_tokenizer(task.tokenizer)
        units = None if task.phrases is None else Units(task.phrases, tokenizer)
        self._encoder = Encoder(tokenizer, units)
        self._task = task

    def encode(self, documents: list[RawDocument]) -> dict[str, Encoded]:
        splits: dict[str, list[list[str]]] = {"train": [], "valid": []}
        for document in documents:
            sentences = sentences_of(document, self._task.sentences)
            held_out = is_held_out(sentences, self._task.held_out)
            splits["valid" if held_out else "train"].append(sentences)
        return {split: self._encoder.encode(parts) for split, parts in splits.items()}


def encode_in_order(
    chunks: Iterator[Chunk], task: Task, num_workers: int
) -> Generator[tuple[Chunk, dict[str, Encoded]], None, None]:
    """Each chunk with its arrays. At most a few chunks a worker are held at a time.

    num_workers: processes to spawn; 1 works in this one.
    """
    if num_workers == 1:
        worker = Worker(task)
        for chunk in chunks:
            yield chunk, worker.encode(chunk.documents)
        return
    context = multiprocessing.get_context("spawn")  # this process may have threads, or torch
    pool = ProcessPoolExecutor(num_workers, context, _begin, (task,))
    waiting: deque[tuple[Chunk, Future[dict[str, Encoded]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode, chunk.documents)))
            if len(waiting) > 2 * num_workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- inside a spawned process -----------------------------------------------------------------

_worker: Worker


def _begin(task: Task) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(task)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: list[RawDocument]) -> dict[str, Encoded]:
    return _worker.encode(documents)
