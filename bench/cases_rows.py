"""Memory-bound ops: GELU, LayerNorm, embeddings, rows to 8 bits, gathered rows, optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import work
from optimizers import optimizer_step
from problem import (
    Case,
    Parity,
    Problem,
    Tensor,
    by_backend,
    check_against,
    compiled,
    equality,
    found,
    half_of,
    leaf,
)

from fastbert import ops

Make = Callable[[str, torch.dtype], Problem]
HIDDEN, INNER, VOCABULARY, LARGE = 768, 3072, work.VOCABULARY, 1024


def cases(where: str, tokens: int) -> Iterator[Case]:
    gpu = where == "cuda"
    # First what no run should be without, should its time end.
    for half in ("fwd-bwd", "bwd", "fwd") if gpu else ("fwd", "fwd-bwd"):
        for dropout in (0.1, 0.0):
            name = f"base-{tokens}-{half}" + "-dropout" * bool(dropout)
            yield Case("add_layer_norm", name, _add_layer_norm(tokens, half, dropout, HIDDEN))
        yield Case("bias_gelu", f"base-{tokens}-{half}", _bias_gelu(tokens, half, INNER))
        yield Case("embed_layer_norm", f"base-{tokens}-{half}", _embed(tokens, half))
    yield Case("gather_rows", f"base-{tokens}-half", _gather(tokens))
    yield Case("scatter_rows", f"base-{tokens}-half", _scatter(tokens))
    if gpu:
        yield Case("quantize_rows", f"base-{tokens}", _quantize_rows(tokens))
        yield Case("quantize_rows_fp8", f"base-{tokens}", _quantize_rows_fp8(tokens))
        yield Case("add_layer_norm_int8", f"base-{tokens}", _add_layer_norm_int8(tokens))
        name = f"large-{tokens}-fwd-bwd"
        yield Case(
            "add_layer_norm", f"{name}-dropout", _add_layer_norm(tokens, "fwd-bwd", 0.1, LARGE)
        )
        yield Case("bias_gelu", name, _bias_gelu(tokens, "fwd-bwd", 4 * LARGE))
    for kind in ("adamw", "adamw-clip", "lamb"):
        yield Case("optimizer", f"base-{kind}", _optimizer(kind))


def _beside_cuda(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    moved: int,
    half: str,
    peers: dict[str, Callable[..., Tensor]] | None = None,
    checked: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
    dy: Tensor | None = None,
) -> Problem:
    """An op that has CUDA C++ kernels too, which are timed beside what the table takes.

    moved: bytes.
    checked: what parity is shown of, where ours and plain draw dropout of their own.
    dy: where it is not shaped as the first input."""
    dy = torch.randn_like(inputs[0]) if dy is None else dy
    functions = {"torch eager": plain, "torch.compile": compiled(plain), **(peers or {})}

    def check() -> Parity:
        return check_against(*(checked or (ours, plain)), inputs, dy)

    others, checks = {}, {}
    if dy.is_cuda:
        others["fastbert cuda"] = by_backend("cuda", half_of(half, ours, inputs, dy))
        checks["fastbert cuda"] = by_backend("cuda", check)
    return Problem(
        half_of(half, ours, inputs, dy),
        {name: half_of(half, function, inputs, dy) for name, function in functions.items()},
        moved,
        0,
        check,
        others,
        checks,
        half,
    )


def _bias_gelu(tokens: int, half: str, inner: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x, bias = (leaf(*s, where=where, dtype=dtype) for s in ((tokens, inner), (inner,)))
        moved = work.bias_gelu(tokens, inner, x.element_size(), half).bytes
        return _beside_cuda(ops.bias_gelu, lambda x, b: F.gelu(x + b), [x, bias], moved, half)

    return make


def _add_layer_norm(tokens: int, half: str, dropout: float, width: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        shapes = ((tokens, width), (tokens, width), (width,), (width,), (width,))
        inputs = [leaf(*s, where=where, dtype=dtype) for s in shapes]
        seed = torch.randint(2**62, (1,), device=where)

        def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return ops.add_layer_norm(x, r, w, b, x_bias=xb)

        def dropped(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return ops.add_layer_norm(x, r, w, b, x_bias=xb, dropout_p=dropout, dropout_seed=seed)

        def plain(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return F.layer_norm(r + F.dropout(x + xb, dropout), (width,), w, b, 1e-12)

        def exact(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return F.layer_norm(r + (x + xb), (width,), w, b, 1e-12)

        counted = work.add_layer_norm(tokens, width, dtype.itemsize, half, bool(dropout))
        return _beside_cuda(
            dropped if dropout else ours, plain if dropout else exact, inputs,
            counted.bytes, half, _layer_norms(where, dtype, dropout),
            (ours, exact),
        )  # fmt: skip

    return make


def _layer_norms(
    where: str, dtype: torch.dtype, dropout: float
) -> dict[str, Callable[..., Tensor]]:
    """Other projects' LayerNorm kernels, with what they leave to torch beside them."""
    peers: dict[str, Callable[..., Tensor]] = {}
    if where != "cuda":
        return peers
    flash = found("flash_attn.ops.triton.layer_norm:layer_norm_fn")
    if flash is not None:

        def by_flash(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return flash(x + xb, w, b, residual=r, eps=1e-12, dropout_p=dropout)

        peers["flash-attn Triton LN"] = by_flash
    liger = found("liger_kernel.ops.layer_norm:LigerLayerNormFunction")
    if liger is not None:

        def by_liger(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return liger.apply(r + F.dropout(x + xb, dropout), w, b, 1e-12)

        peers["Liger"] = by_liger
    return peers


def _embed(tokens: int, half: str) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        shapes = ((VOCABULARY, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,))
        tables = [leaf(*s, where=where, dtype=dtype) for s in shapes]
        ids = torch.randint(VOCABULARY, (tokens,), device=where)
        places = torch.arange(tokens, device=where) % 128
        types = torch.randint(2, (tokens,), device=where)
        dy = torch.randn(tokens, HIDDEN, device=where).to(dtype)

        def ours(*t: Tensor) -> Tensor:
            return ops.embed_layer_norm(ids, places, types, *t)

        def plain(word: Tensor, position: Tensor, kind: Tensor, w: Tensor, b: Tensor) -> Tensor:
            e = F.embedding(ids, word) + F.embedding(places, position) + F.embedding(types, kind)
            return F.layer_norm(e, (HIDDEN,), w, b, 1e-12)

        moved = work.embed_layer_norm(tokens, HIDDEN, dtype.itemsize, half).bytes
        return _beside_cuda(ours, plain, tables, moved, half, dy=dy)

    return make


def _gather(tokens: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, HIDDEN, device=where).to(dtype)
        index = torch.arange(0, tokens, 2, device=where)
        return Problem(
            torch.no_grad()(lambda: ops.gather_rows(x, index)),
            {"torch index_select": lambda: x.index_select(0, index)},
            work.gather_rows(len(index), HIDDEN, dtype.itemsize).bytes,
            0,
            lambda: equality(torch.equal(ops.gather_rows(x, index), x[index])),
        )

    return make


def _scatter(tokens: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens // 2, HIDDEN, device=where).to(dtype)
        index = torch.arange(0, tokens, 2, device=where)

        def peer() -> Tensor:
            return x.new_zeros(tokens, HIDDEN).index_copy_(0, index, x)

        return Problem(
            torch.no_grad()(lambda: ops.scatter_rows(x, index, tokens)),
            {"torch zeros + index_copy": peer},
            work.scatter_rows(len(x), HIDDEN, tokens, dtype.itemsize).bytes,
            0,
            lambda: equality(torch.equal(ops.scatter_rows(x, index, tokens), peer())),
        )

    return make


def _quantize_rows(tokens: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, HIDDEN, device=where).to(dtype)

        def plain() -> Tensor:
            low, high = x.float().aminmax(dim=1, keepdim=True)
            return ((x - (low + high) / 2) * (254 / (high - low))).round().to(torch.int8)

        def check() -> Parity:
            q, scale, offset = ops.quantize_rows(x)
            step = (q * scale[:, None] + offset[:, None] - x).abs() / scale[:, None]
            return Parity(float(step.max()) / 0.501)  # half a step, and what fp32 rounds

        peers = {"torch eager": plain, "torch.compile": compiled(plain)}
        moved = x.numel() * (x.element_size() + 1)
        return Problem(torch.no_grad()(lambda: ops.quantize_rows(x)), peers, moved, 0, check)

    return make


def _quantize_rows_fp8(tokens: int) -> Make:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, HIDDEN, device=where).to(dtype)

        def plain() -> Tensor:
            return (x * (448 / x.float().abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn)

        def check() -> Parity:
            q, scale = ops.quantize_rows_fp8(x)
            exact = x.double() / scale.double()[:, None]
            step = (q.double() - exact).abs() / exact.abs().clamp_min(2**-6)
            return Parity(float(step.max()) / 0.0626)

        peers = {"torch eager": plain, "torch.compile": compiled(plain)}
        moved = x.numel() * (x.element_size() + 1)
        return Problem(torch.no_grad()(lambda: ops.quantize_rows_fp8(x)), peers, moved, 0, check)

    return make


def _add_layer_norm_int8(tokens: int) -> Make:
    """Beside our own two kernels, whose work it does in one."""

    def make(where: str, dtype: torch.dtype) -> Problem:
        x, residual = (torch.randn(tokens, HIDDEN, device=where).to(dtype) for _ in range(2))
        w, b = torch.randn(2, HIDDEN, device=where)

        def two() -> Tensor:
            return ops.quantize_rows(ops.add_layer_norm(x, residual, w, b))[0]

        def check() -> Parity:
            """The two are compiled apart: where one contracts a sum of a product to one rounding
            and the other does not, a value that lies between two steps goes to the other one."""
            steps = (ops.add_layer_norm_int8(x, residual, w, b)[1].int() - two().int()).abs()
            differing = float((steps > 0).double().mean())
            return Parity(max(float(steps.max()), differing / 1e-5))

        ours = torch.no_grad()(lambda: ops.add_layer_norm_int8(x, residual, w, b))
        moved = x.numel() * (3 * x.element_size() + 1)
        peers = {"add_layer_norm, quantize_rows": torch.no_grad()(two)}
        return Problem(ours, peers, moved, 0, check)

    return make


def _optimizer(kind: str) -> Make:
    return lambda where, dtype: Problem(*optimizer_step(kind, where, dtype))
