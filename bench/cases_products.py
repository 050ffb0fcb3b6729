"""Matrix products with what follows in the same call: feed-forward, MLM head, int8 and fp8."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import work
from problem import (
    Case,
    Parity,
    Problem,
    Run,
    Tensor,
    check_against,
    compiled,
    found,
    half_of,
    leaf,
    parity,
)

from fastbert import ops

Make = Callable[[str, torch.dtype], Problem]
HIDDEN, INNER, VOCABULARY = 768, 3072, work.VOCABULARY
SIZES = {"base": 768, "large": 1024}
# In the package the function of this name hides its module.
_feed_forward_module = importlib.import_module("fastbert.ops.feed_forward")


def cases(where: str, tokens: int) -> Iterator[Case]:
    rows = tokens * 3 // 20
    yield Case("linear_cross_entropy", f"base-{rows}-rows", _head(rows, HIDDEN))
    for half in ("fwd-bwd", "fwd", "bwd") if where == "cuda" else ("fwd-bwd",):
        yield Case("feed_forward", f"base-{tokens}-{half}", _feed_forward(tokens, half, HIDDEN))
    if where == "cuda":
        large = SIZES["large"]
        yield Case("linear_cross_entropy", f"large-{rows}-rows", _head(rows, large))
        name = f"large-{tokens}-fwd-bwd"
        yield Case("feed_forward", name, _feed_forward(tokens, "fwd-bwd", large))
        yield Case("linear_int8", f"base-{tokens}-up-gelu", int8(tokens))
        yield Case("linear_int8", "base-128-up-gelu", int8(128))
        yield Case("linear_fp8", f"base-{tokens}-up-gelu", _fp8(tokens))


def _feed_forward(tokens: int, half: str, hidden: int) -> Make:
    """By BLAS and bias_gelu, as it runs unless told otherwise, and with GELU in the products."""

    inner = 4 * hidden

    def make(where: str, dtype: torch.dtype) -> Problem:
        x = leaf(tokens, hidden, where=where, dtype=dtype)
        w1 = leaf(inner, hidden, where=where, dtype=dtype, scale=hidden**-0.5)
        w2 = leaf(hidden, inner, where=where, dtype=dtype, scale=inner**-0.5)
        inputs = [x, w1, leaf(inner, where=where, dtype=dtype), w2]
        dy = torch.randn(tokens, hidden, device=where).to(dtype)

        def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, w1, b1)), w2)

        def check() -> Parity:
            return check_against(ops.feed_forward, plain, inputs, dy)

        others, checks = {}, {}
        for fused in ({"fwd"}, {"bwd"}, {"fwd", "bwd"}) if where == "cuda" else ():
            name = f"fastbert, {' and '.join(sorted(fused))} fused"
            run = half_of(half, ops.feed_forward, inputs, dy)
            others[name] = _fused(run, frozenset(fused))
            checks[name] = _fused(check, frozenset(fused))
        counted = work.feed_forward(tokens, hidden, dtype.itemsize, half)
        functions = {"torch eager": plain, "torch.compile": compiled(plain)}
        return Problem(
            half_of(half, ops.feed_forward, inputs, dy),
            {name: half_of(half, function, inputs, dy) for name, function in functions.items()},
            counted.bytes,
            counted.flops,
            check,
            others,
            checks,
            half,
        )

    return make


def _fused(run: Run, fused: frozenset[str]) -> Run:
    def call() -> Any:
        before = _feed_forward_module.FUSED
        _feed_forward_module.FUSED = fused
        try:
            return run()
        finally:
            _feed_forward_module.FUSED = before

    return call


def _head(rows: int, width: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        hidden = leaf(rows, width, where=where, dtype=dtype)
        # BERT's own initialisation. Wider logits have probabilities below 1e-38, and the products
        # with those, ours and torch's, take ten times as long on denormal numbers.
        weight = leaf(VOCABULARY, width, where=where, dtype=dtype, scale=0.02)
        inputs = [hidden, weight, leaf(VOCABULARY, where=where, dtype=dtype)]
        labels = torch.randint(VOCABULARY, (rows,), device=where)
        one = torch.ones((), device=where)

        def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return ops.linear_cross_entropy(h, w, b, labels)

        def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            wide = torch.promote_types(h.dtype, torch.float32)
            return F.cross_entropy(F.linear(h, w, b).to(wide), labels)

        counted = work.linear_cross_entropy(rows, width, dtype.itemsize)
        functions = {"torch eager": plain, "torch.compile": compiled(plain)}
        if where == "cuda":
            functions |= _fused_heads(labels)
        return Problem(
            half_of("fwd-bwd", ours, inputs, one),
            {
                name: half_of("fwd-bwd", function, inputs, one)
                for name, function in functions.items()
            },
            counted.bytes,
            counted.flops,
            lambda: check_against(ours, plain, inputs, one),
            half="fwd-bwd",
        )

    return make


def _fused_heads(labels: Tensor) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {}
    liger = found("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")
    if liger is not None:
        loss = liger()
        peers["Liger"] = lambda h, w, b: loss(w, h, labels, b)
    cut = found("cut_cross_entropy:linear_cross_entropy")
    if cut is not None:
        peers["cut-cross-entropy"] = lambda h, w, b: cut(h, w, labels, bias=b)
    return peers


def int8(tokens: int) -> Make:
    """The up projection of BERT-base, its rows' quantisation included."""

    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, HIDDEN, device=where).to(dtype)
        w = (0.02 * torch.randn(INNER, HIDDEN, device=where)).to(dtype)
        bias = torch.randn(INNER, device=where)
        w_scale = w.float().abs().amax(1) / 127
        wq = (w.float() / w_scale[:, None]).round().to(torch.int8)
        column_sum = ops.column_sums(wq, w_scale)

        def ours() -> Tensor:
            q, scale, offset = ops.quantize_rows(x)
            return ops.linear_int8(
                q, scale, wq, w_scale, bias,
                offset=offset, column_sum=column_sum, activation="gelu", dtype=dtype,
            )  # fmt: skip

        def int_mm() -> Tensor:
            q, scale, offset = ops.quantize_rows(x)
            sums = torch._int_mm(q, wq.t()) * scale[:, None] * w_scale
            return F.gelu(sums + offset[:, None] * column_sum + bias).to(dtype)

        peers = {
            "torch Linear + GELU": lambda: F.gelu(F.linear(x, w, bias.to(dtype))),
            "torch._int_mm": int_mm,
            "torch._int_mm compiled": compiled(int_mm),
        }
        return _eight_bits(ours, peers, x, w, bias, 0.03)

    return make


def _fp8(tokens: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, HIDDEN, device=where).to(dtype)
        w = (0.02 * torch.randn(INNER, HIDDEN, device=where)).to(dtype)
        bias = torch.randn(INNER, device=where)
        wq, w_scale = ops.quantize_rows_fp8(w)

        def ours() -> Tensor:
            q, scale = ops.quantize_rows_fp8(x)
            return ops.linear_fp8(q, scale, wq, w_scale, bias, activation="gelu", dtype=dtype)

        def scaled_mm() -> Tensor:
            q, scale = ops.quantize_rows_fp8(x)
            y = torch._scaled_mm(
                q, wq.t(), scale_a=scale[:, None], scale_b=w_scale[None],
                bias=bias.bfloat16(), out_dtype=torch.bfloat16,
            )  # fmt: skip
            return F.gelu(y)

        peers = {"torch Linear + GELU": lambda: F.gelu(F.linear(x, w, bias.to(dtype)))}
        if dtype == torch.bfloat16:
            peers |= {
                "torch._scaled_mm": scaled_mm,
                "torch._scaled_mm compiled": compiled(scaled_mm),
            }
        return _eight_bits(ours, peers, x, w, bias, 0.06)

    return make


def _eight_bits(
    ours: Run, peers: dict[str, Run], x: Tensor, w: Tensor, bias: Tensor, coarse: float
) -> Problem:
    """coarse: the error that eight bits may make, of the largest value."""

    def check() -> Parity:
        exact = F.gelu(x.double() @ w.double().t() + bias.double())
        return parity(ours(), exact, coarse, F.gelu(F.linear(x, w, bias.to(x.dtype))))

    moved = (x.numel() + len(x) * len(w)) * x.element_size() + w.numel()
    return Problem(
        torch.no_grad()(ours),
        {name: torch.no_grad()(run) for name, run in peers.items()},
        moved,
        2 * len(x) * w.numel(),
        check,
    )
