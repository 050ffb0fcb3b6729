"""One model under many requests from many threads (slow tier): real weights, real sentences."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import fastbert
from fastbert import _native, demo
from fastbert.compress import load_float
from fastbert.runtime import Encoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.cpu_reason() is not None, reason=str(_native.cpu_reason())),
]

THREADS, REQUESTS = 8, 1000


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    try:
        model = load_float(demo.checkpoint())
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("minilm")
    fastbert.quantize(model).save_pretrained(folder)
    return Encoder(folder, 2)


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def test_many_requests_from_many_threads(encoder: Encoder) -> None:
    """No error, the same bits every time, and no growth once every thread has been seen."""
    texts = [text for text in demo.documentation_texts(400) if len(text.split()) <= 30][:100]
    alone = [encoder.encode([text]) for text in texts]
    problems: list[str] = []

    def ask(seed: int, requests: int) -> None:
        order = np.random.default_rng(seed).integers(0, len(texts), requests)
        try:
            for i in order:
                if not np.array_equal(encoder.encode([texts[i]]), alone[i]):
                    problems.append(f"another vector for {texts[i]!r}")
        except Exception as error:  # a thread's own would go unseen
            problems.append(repr(error))

    def ask_from_all(requests: int) -> int:
        threads = [threading.Thread(target=ask, args=(n, requests)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return resident()

    before = ask_from_all(50)
    after = ask_from_all(REQUESTS)
    assert not problems, problems[:3]
    assert after - before < 8 << 20, f"grew by {(after - before) / 2**20:.1f} MiB"
