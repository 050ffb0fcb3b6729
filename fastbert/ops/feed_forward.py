"""feed_forward: ``gelu(x w1^T + b1) w2^T``, keeping one (T, I) tensor for backward, not three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import wants_grad
from fastbert.ops._matmul import autocast_to, mm, mm_t
from fastbert.ops._registry import OPS
from fastbert.ops.bias_gelu import bias_gelu, launch_backward, launch_forward
from fastbert.ops.linear import traced_linear

# The halves, of "fwd" and "bwd", that are one Triton product with GELU in its epilogue, where they
# can be (see _fuses), instead of a BLAS product and bias_gelu. None until a GPU has shown that a
# half is faster so: `python bench/run.py --op feed_forward` times each way.
FUSED: frozenset[str] = frozenset()

# Rows that go through both products at a time when nothing is kept for backward: the (rows, I)
# intermediate is then one reused buffer that stays in cache, whatever the batch. On CPU a fresh
# (T, I) tensor past glibc's 32 MiB mmap threshold would cost a page fault every 4 KiB instead.
# BERT-base, 1024 tokens, fp32: 512 rows take 0.91 of the time of 1024 at once; below 256 the
# products get slower faster than GELU gains.
_CPU_ROWS = 512


def feed_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    *,
    approximate: str = "none",
) -> torch.Tensor:
    """y = gelu(x w1^T + b1) w2^T (Vaswani et al., arXiv 1706.03762, eq. 2, with GELU); the bias of
    the second matrix belongs to the add_layer_norm that follows.

    x: (T, H).  w1: (I, H).  b1: (I,) in that dtype or fp32.  w2: (H, I).  Returns (T, H); under
    autocast in the autocast dtype.  ``approximate`` as in bias_gelu.
    Backward keeps x and the (T, I) product before the bias, and computes GELU again. ``FUSED`` says
    which halves have GELU inside a product, in eager mode.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
    x, w1, w2 = autocast_to(x, w1, w2)
    _check.activation("x", x, ("T", "H"))
    _check.like("w1", w1, x, (w1.shape[0], x.shape[1]))
    _check.like("w2", w2, x, (w2.shape[0], w1.shape[0]))
    _check.vector("b1", b1, x, w1.shape[0])
    if torch.compiler.is_compiling():
        pre = traced_linear(x, w1, None)
        return traced_linear(bias_gelu(pre, b1, approximate=approximate), w2, None)
    if torch.is_grad_enabled() and wants_grad(x, w1, b1, w2):
        return _FeedForward.apply(x, w1, b1, w2, approximate == "tanh")
    return _inference(x, w1, b1, w2, approximate == "tanh")


def feed_forward_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    approximate: str = "none",
) -> torch.Tensor:
    bias = None if b1 is None else b1.to(x.dtype)
    return F.linear(F.gelu(F.linear(x, w1, bias), approximate=approximate), w2)


def _inference(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, tanh: bool
) -> torch.Tensor:
    tokens = x.shape[0]
    if _fuses("fwd", x, w1):
        return mm_t(_launch("fwd", x, w1)(x, w1, b1, tanh, False)[0], w2)
    rows = _CPU_ROWS if x.device.type == "cpu" else max(1, tokens)
    if tokens <= rows:
        return mm_t(launch_forward(mm_t(x, w1), b1, tanh), w2)
    y = x.new_empty(tokens, w2.shape[0])
    buffer = x.new_empty(rows, w1.shape[0])
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        pre = mm_t(x[part], w1, out=buffer[: part.stop - start])
        mm_t(launch_forward(pre, b1, tanh), w2, out=y[part])
    return y


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        tanh: bool,
    ) -> torch.Tensor:
        if _fuses("fwd", x, w1):
            y, pre = _launch("fwd", x, w1)(x, w1, b1, tanh, True)
        else:
            pre = mm_t(x, w1)
            y = launch_forward(pre, b1, tanh)
        ctx.tanh = tanh
        ctx.save_for_backward(x, w1, b1, w2, pre)
        return mm_t(y, w2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, w1, b1, w2, pre = ctx.saved_tensors
        want_x, want_w1, want_b1, want_w2, _ = ctx.needs_input_grad
        through_gelu = want_x or want_w1 or want_b1
        if through_gelu and _fuses("bwd", dy, w2, pre):
            dpre, db1, y = _launch("bwd", dy, w2)(dy, w2, pre, b1, ctx.tanh, want_w2)
            dw2 = mm(dy.t(), y) if want_w2 else None
            del y  # as wide as pre and dpre: gone before the next products
        else:
            dw2 = mm(dy.t(), launch_forward(pre, b1, ctx.tanh)) if want_w2 else None
            if not through_gelu:
                return None, None, None, dw2, None
            dpre, db1 = launch_backward(mm(dy, w2), pre, b1, ctx.tanh)
        dx = mm(dpre, w1) if want_x else None
        dw1 = mm(dpre.t(), x) if want_w1 else None
        return dx, dw1, db1 if want_b1 else None, dw2, None


def _fuses(half: str, *matrices: torch.Tensor) -> bool:
    """Whether ``half`` is to be fused and can be: where Triton computes bias_gelu, in 16 bits, on
    matrices whose addresses and rows are multiples of 16 bytes."""
    x = matrices[0]
    return (
        half in FUSED
        and x.element_size() == 2
        and OPS["bias_gelu"].choice(x, x.shape[1]) == "triton"
        and all(m.is_contiguous() and m.data_ptr() % 16 == 0 for m in matrices)
        and all(m.shape[1] % 8 == 0 for m in matrices)
    )


def _launch(half: str, x: torch.Tensor, w: torch.Tensor) -> Callable[..., Any]:
    return OPS["feed_forward"].launcher(half, x, w.shape[1])
