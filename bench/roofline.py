"""The least time that BERT's ops and steps can take: ``python bench/roofline.py``.

    bound = max(bytes / copy bandwidth, FLOPs / matrix rate)

of each op by itself (Williams, Waterman, Patterson, "Roofline", CACM 2009), and of a step the sum
over its ops, one after the other, in bf16, each with its operands in memory: a fusion of two ops
has a bound of its own, below their sum. Bytes and FLOPs are those of ``work``, which
``bench/run.py`` holds its times against too. A step's compute alone is that of its model FLOPs
(``masked_lm.flops``, ``fastbert.train.flops``), without attention's recomputed probabilities.

    python bench/roofline.py                            # ceilings measured here and now
    python bench/roofline.py --copy 4300 --bf16 790     # given, GB/s and TFLOP/s: an H200's
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import work  # noqa: E402
from work import Work  # noqa: E402

BYTES = 2  # of a bf16 number
MASKED = 0.15


class Ceilings(NamedTuple):
    """copy: bytes a second, read plus written.  matrix: FLOPs a second."""

    copy: float
    matrix: float


class Model(NamedTuple):
    layers: int
    hidden: int
    heads: int

    def parameters(self) -> int:
        """Of the encoder, its embeddings and the MLM head, vectors left out."""
        tables = work.VOCABULARY + 512 + 2
        return self.hidden * (12 * self.layers * self.hidden + tables + self.hidden)


MODELS = {"base": Model(12, 768, 12), "large": Model(24, 1024, 16)}


class Row(NamedTuple):
    """An op of a step.  count: how often it runs."""

    op: str
    count: int
    work: Work


def bound(of: Work, ceilings: Ceilings) -> float:
    """Seconds."""
    return max(of.bytes / ceilings.copy, of.flops / ceilings.matrix)


def rows(model: Model, lengths: list[int], training: bool) -> Iterator[Row]:
    """The ops of an encoder's forward pass, or of a masked-LM training step with dropout."""
    layers, hidden, heads = model
    tokens, half = sum(lengths), "fwd-bwd" if training else "fwd"

    def linear(name: str, n: int, k: int) -> Row:
        return Row(name, layers, work.linear(tokens, n, k, BYTES, half))

    norm = work.add_layer_norm(tokens, hidden, BYTES, half, dropout=training)
    yield Row("embed_layer_norm", 1, work.embed_layer_norm(tokens, hidden, BYTES, half))
    yield linear("linear qkv", 3 * hidden, hidden)
    attention = work.attention(lengths, heads, hidden // heads, BYTES, half)
    yield Row("attention", layers, attention)
    yield linear("linear output", hidden, hidden)
    yield Row("add_layer_norm", 2 * layers, norm)
    yield linear("linear up", 4 * hidden, hidden)
    yield Row("bias_gelu", layers, work.bias_gelu(tokens, 4 * hidden, BYTES, half))
    yield linear("linear down", hidden, 4 * hidden)
    if training:
        masked = round(MASKED * tokens)
        yield Row("gather_rows", 1, work.gather_rows(masked, hidden, BYTES))
        yield Row("linear head", 1, work.linear(masked, hidden, hidden, BYTES, half))
        yield Row("linear_cross_entropy", 1, work.linear_cross_entropy(masked, hidden, BYTES))
        yield Row("scatter_rows", 1, work.scatter_rows(masked, hidden, tokens, BYTES))
        yield Row("optimizer adamw", 1, work.optimizer(model.parameters(), BYTES, lamb=False))


def model_flops(model: Model, lengths: list[int], training: bool) -> int:
    """What the step's mathematics multiplies: attention's probabilities once."""
    step = sum(row.count * row.work.flops for row in rows(model, lengths, training))
    if not training:
        return step
    again = 2 * model.hidden * sum(n * n for n in lengths)
    return step - model.layers * again


class Floor(NamedTuple):
    """Seconds of a step: of its model FLOPs alone, and the sum of its ops' bounds."""

    compute: float
    bound: float


def floor(model: Model, lengths: list[int], training: bool, ceilings: Ceilings) -> Floor:
    compute = model_flops(model, lengths, training) / ceilings.matrix
    each = rows(model, lengths, training)
    return Floor(compute, sum(row.count * bound(row.work, ceilings) for row in each))


def table(model: Model, lengths: list[int], training: bool, ceilings: Ceilings) -> str:
    """A line an op, in nanoseconds a token of all its runs, and the step."""
    tokens = sum(lengths)
    columns = ("kB", "MFLOP", "memory", "compute", "bound")
    lines = [f"{'op':<23}{'runs':>5}{''.join(f'{name:>9}' for name in columns)}  ns/token"]
    for name, count, of in rows(model, lengths, training):
        memory, compute = of.bytes / ceilings.copy, of.flops / ceilings.matrix
        scale = count / tokens
        numbers = (of.bytes / 1e3, of.flops / 1e6, memory * 1e9, compute * 1e9)
        kilobytes, mega, memory, compute = (scale * number for number in numbers)
        lines.append(
            f"{name:<23}{count:>5}{kilobytes:>9.2f}{mega:>9.2f}{memory:>9.1f}{compute:>9.1f}"
            f"{max(memory, compute):>9.1f}  {'memory' if memory > compute else 'compute'}"
        )
    found = floor(model, lengths, training, ceilings)
    compute, least = (1e9 * seconds / tokens for seconds in found)
    lines.append(
        f"{'step':<23}{'':>32}{compute:>9.0f}{least:>9.0f}  at most {1e3 / least:.2f} M tokens/s"
    )
    return "\n".join(lines)


def measured() -> Ceilings:
    """Of this machine, its GPU if there is one, in bf16."""
    import torch
    from timing import ceilings

    from fastbert import device

    where = "cuda" if device.cuda_reason() is None else "cpu"
    found = ceilings(where, torch.bfloat16)
    return Ceilings(1e9 * found["copy_gb_s"], 1e9 * found["matrix_gflop_s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy", type=float, help="GB/s, read plus written; default: measured")
    parser.add_argument("--bf16", type=float, help="TFLOP/s; default: measured")
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch")
    args = parser.parse_args()
    if args.copy is None or args.bf16 is None:
        here = measured()
        args.copy, args.bf16 = args.copy or here.copy / 1e9, args.bf16 or here.matrix / 1e12
    ceilings = Ceilings(1e9 * args.copy, 1e12 * args.bf16)
    print(f"copy {args.copy:,.0f} GB/s, bf16 products {args.bf16:,.1f} TFLOP/s")
    for size, model in MODELS.items():
        for length in (128, 512):
            lengths = [length] * max(1, args.tokens // length)
            for training in (True, False):
                task = "masked-LM training" if training else "inference"
                print(f"\n{size}, B{len(lengths)} S{length}, {task}")
                print(table(model, lengths, training, ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
