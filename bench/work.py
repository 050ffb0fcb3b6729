"""What ops have to move and to multiply, of their shapes alone: what benches hold times against.

Bytes count each input read once and each output written once, FLOPs the multiplications and
additions of the mathematics: a floor, not what a kernel happens to do. Vectors as short as a row
(biases, LayerNorm's weights, statistics) are left out. half: "fwd", "bwd" or "fwd-bwd".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VOCABULARY = 30522


@dataclass(frozen=True)
class Work:
    """bytes: to and from memory.  flops: of matrix products, which alone are counted."""

    bytes: int
    flops: int = 0


def _of(half: str, forward: int, backward: int) -> int:
    return {"fwd": forward, "bwd": backward, "fwd-bwd": forward + backward}[half]


def linear(rows: int, n: int, k: int, itemsize: int, half: str) -> Work:
    """y (rows, n) = x (rows, k) w^T; dx = dy w, dw = dy^T x, dy read once."""
    x, w, y = rows * k, n * k, rows * n
    return Work(_of(half, x + w + y, y + 2 * x + 2 * w) * itemsize, _of(half, 2, 4) * rows * n * k)


def attention(lengths: Sequence[int], heads: int, dim: int, itemsize: int, half: str) -> Work:
    """Forward: q, k, v read, out written, two products. Backward: q, k, v, out, dout read, dq, dk,
    dv written, five products, of which one gives the probabilities again."""
    elements = sum(lengths) * heads * dim
    scores = heads * sum(n * n for n in lengths)
    return Work(_of(half, 4, 8) * elements * itemsize, _of(half, 2, 5) * 2 * dim * scores)


def dropout_mask(lengths: Sequence[int], heads: int) -> Work:
    """The bits of attention's packed mask, moved once."""
    return Work(heads * sum(n * n for n in lengths) // 8)


def add_layer_norm(tokens: int, width: int, itemsize: int, half: str, dropout: bool) -> Work:
    """Forward: x and the residual read, y and (with a backward to come) z written. Backward: dy and
    z read, dz written, and with dropout dx beside it."""
    moved = _of(half, 3 if half == "fwd" else 4, 4 if dropout else 3)
    return Work(moved * tokens * width * itemsize)


def bias_gelu(tokens: int, inner: int, itemsize: int, half: str) -> Work:
    """Forward: x read, y written. Backward: dy and x read, dx written."""
    return Work(_of(half, 2, 3) * tokens * inner * itemsize)


def embed_layer_norm(tokens: int, hidden: int, itemsize: int, half: str) -> Work:
    """Forward: a row of the word table read, y written; positions and types stay in cache.
    Backward: dy and the row read, the word table's gradient written."""
    rows = tokens * hidden
    return Work(_of(half, 2 * rows, 2 * rows + VOCABULARY * hidden) * itemsize)


def gather_rows(rows: int, width: int, itemsize: int) -> Work:
    """Rows read and written elsewhere."""
    return Work(2 * rows * width * itemsize)


def scatter_rows(rows: int, width: int, total: int, itemsize: int) -> Work:
    """Rows read, and written among zeros to ``total`` rows."""
    return Work((rows + total) * width * itemsize)


def feed_forward(tokens: int, hidden: int, itemsize: int, half: str) -> Work:
    """x and both weights read, y written, as if nothing in between reached memory; forward and
    backward alike, whose gradients as large as these are left out."""
    inner = 4 * hidden
    moved = 2 * tokens * hidden + 2 * hidden * inner
    return Work(moved * itemsize, _of(half, 2, 4) * 2 * tokens * hidden * inner)


def linear_cross_entropy(rows: int, hidden: int, itemsize: int) -> Work:
    """Both halves: the decoder read twice and its gradient written, no logits to memory."""
    moved = 3 * VOCABULARY * hidden * itemsize
    return Work(moved, 6 * rows * hidden * VOCABULARY)


def optimizer(elements: int, itemsize: int, lamb: bool) -> Work:
    """p, m, v read and written in fp32, the gradient of ``itemsize`` bytes read, a 16-bit copy
    written; LAMB reads p, m, v once more."""
    return Work(elements * (24 + itemsize + (2 if itemsize == 2 else 0) + 12 * lamb))
