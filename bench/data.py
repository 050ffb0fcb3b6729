"""Time the way from text to batches: ``python bench/data.py --text FILE… --tokenizer DIR``.

Stages, each in tokens a second of one process (so of one core, but for what a library spreads over
threads of its own):

    sentences     raw documents to sentences
    tokenise      sentences to token ids, beside ``tokenizers.encode_batch`` on all cores and on one
    write         arrays to a shard on disk, checksum and fsync among it
    batch         shards to packed batches of --batch-tokens: examples of up to --length tokens,
                  with one thread for torch, as a worker of a DataLoader has
    prepare N     all of it but the last, text to corpus, with N workers

"tokenise cold" is an Encoder that has seen nothing, "warm" one that has seen this text before; on a
text of any size it begins cold and comes near warm. Candidates of a stage take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import Timing, interleave, machine, write  # noqa: E402

from fastbert import device  # noqa: E402
from fastbert.data import Corpus, TokenBatches, load_tokenizer, pack, prepare  # noqa: E402
from fastbert.data.encode import Encoder  # noqa: E402
from fastbert.data.files import Problems  # noqa: E402
from fastbert.data.sentences import sentences_of  # noqa: E402
from fastbert.data.shards import write_shard  # noqa: E402
from fastbert.data.sources import find_sources  # noqa: E402
from fastbert.data.tokenizer import word_starts  # noqa: E402


class Bench:
    """The text, in memory, and what is made of it."""

    def __init__(self, texts: list[str], tokenizer: Path, scratch: Path) -> None:
        self.texts, self.folder, self.scratch = texts, tokenizer, scratch
        sources = find_sources(texts)
        self.raw = [d for source in sources for d in source.documents(Problems(skip=False))]
        self.documents = [sentences_of(document) for document in self.raw]
        self.tokenizer = load_tokenizer(tokenizer)
        self.encoder = Encoder(self.tokenizer)
        self.encoded = self.encoder.encode(self.documents)
        self.tokens = len(self.encoded.tokens)
        self.flat = [sentence for document in self.documents for sentence in document]
        self.check()

    def check(self) -> None:
        """Ours are the tokenizer's ids, or there is no speed to speak of."""
        self.tokenizer.encode_special_tokens = True
        encodings = self.tokenizer.encode_batch(self.flat, add_special_tokens=False)
        if [i for e in encodings for i in e.ids] != self.encoded.tokens.tolist():
            raise SystemExit("parity: token ids differ from the tokenizer's; nothing is timed")

    def library(self, threads: bool) -> Callable[[], Any]:
        def run() -> Any:
            os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
            return self.tokenizer.encode_batch(self.flat, add_special_tokens=False)

        return run

    def write(self) -> Any:
        size = len(word_starts(self.tokenizer))
        return write_shard(self.scratch, "shard.safetensors", [self.encoded], size, units=False)

    def prepare(self, workers: int) -> Callable[[], Any]:
        def run() -> Any:
            return prepare(
                self.texts, self.scratch / str(workers), tokenizer=self.folder, held_out=0,
                num_workers=workers, overwrite=True, progress=False,
            )  # fmt: skip

        return run

    def batch(self, length: int, batch_tokens: int) -> tuple[Callable[[], int], int]:
        """A pass over the corpus, and how many tokens that is."""
        corpus = Corpus(self.scratch / "1")
        ends = np.cumsum(corpus.document_lengths())
        spans = np.array(
            [
                (first, min(first + length, int(end)))
                for begin, end in zip(np.append(0, ends[:-1]), ends, strict=True)
                for first in range(int(begin), int(end), length)
            ]
        )
        batches = TokenBatches(spans[:, 1] - spans[:, 0], batch_tokens, seed=0)

        def run() -> int:
            tokens = 0
            for batch in batches:
                examples = [{"input_ids": corpus.tokens(a, b)} for a, b in spans[batch].tolist()]
                tokens += pack(examples)[0].num_tokens
            batches.advance()
            return tokens

        return run, corpus.num_tokens


def row(stage: str, name: str, tokens: int, timing: Timing) -> dict[str, Any]:
    found = {
        "stage": stage,
        "candidate": name,
        "tokens": tokens,
        "median_ms": timing.median * 1e3,
        "spread_percent": timing.spread_percent,
        "tokens_per_s": tokens / timing.median,
        "calls": timing.calls,
    }
    rate = f"{found['tokens_per_s'] / 1e6:.2f} M tokens/s"
    print(f"{stage:10} {name:28} {rate:>18}  ±{timing.spread_percent:.0f}%", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, help="as `fastbert prepare` takes it")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=10.0, help="per stage")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = args.out or Path(__file__).parent / "results" / "data_cpu.json"
    facts, rows = machine(), []
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as scratch:
        bench = Bench(args.text, args.tokenizer, Path(scratch))
        workers = sorted({1, device.num_cpus()})
        prepared = {f"prepare {n}": bench.prepare(n) for n in workers}
        stages: dict[str, dict[str, Callable[[], Any]]] = {
            "sentences": {"fastbert": lambda: [sentences_of(document) for document in bench.raw]},
            "tokenise": {
                "fastbert, warm": lambda: bench.encoder.encode(bench.documents),
                "fastbert, cold": lambda: Encoder(bench.tokenizer).encode(bench.documents),
                "tokenizers, one core": bench.library(threads=False),
                "tokenizers, all cores": bench.library(threads=True),
            },
            "write": {"fastbert": bench.write},
            "prepare": prepared,
        }
        for stage, candidates in stages.items():
            for name, timing in interleave(candidates, "cpu", args.seconds).items():
                rows.append(row(stage, name, bench.tokens, timing))
        torch.set_num_threads(1)
        run, tokens = bench.batch(args.length, args.batch_tokens)
        timing = interleave({"fastbert": run}, "cpu", args.seconds)["fastbert"]
        rows.append(row("batch", "fastbert", tokens, timing))
    result = {
        "machine": facts,
        "text": [Path(text).name for text in args.text],
        "vocab_size": len(word_starts(bench.tokenizer)),
        "characters": sum(map(len, bench.flat)),
        "length": args.length,
        "batch_tokens": args.batch_tokens,
        "rows": rows,
    }
    write(path, result)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
