"""Attention of BERT's shapes: dense, evenly spaced and Wikipedia-like lengths, dropout or none."""

from __future__ import annotations

import contextlib
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
    by_backend,
    compare,
    compiled,
    equality,
    found,
    grads,
    half_of,
    leaf,
    lengths_of,
)
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastbert import _native, ops
from fastbert.packed import PackedBatch

BASE, LARGE = (12, 64), (16, 64)  # heads and their dimension


def cases(where: str, tokens: int) -> Iterator[Case]:
    gpu = where == "cuda"
    kinds = (("dense", 128), ("dense", 512), ("ragged", 512), ("wikipedia", 512))
    # First what no run should be without, should its time end.
    for half in ("fwd-bwd", "fwd", "bwd") if gpu else ("fwd", "fwd-bwd"):
        for kind, longest in kinds:
            count = tokens // longest * (1 if kind == "dense" else 2)
            for dropout in (0.0, 0.1) if gpu else (0.0,):
                yield _case("base", BASE, kind, count, longest, half, dropout)
    if not gpu:
        yield _case("base", BASE, "dense", tokens // 512, 512, "fwd-bwd", 0.1)
        return
    for half in ("fwd", "fwd-bwd"):
        for size, heads in (("D32", (24, 32)), ("D128", (6, 128)), ("large", LARGE)):
            yield _case(size, heads, "dense", tokens // 512, 512, half, 0.0)
            yield _case(size, heads, "dense", tokens // 512, 512, half, 0.1)


def _case(
    size: str,
    heads: tuple[int, int],
    kind: str,
    count: int,
    longest: int,
    half: str,
    dropout: float,
) -> Case:
    name = f"{size}-{kind}-{count}x{longest}-{half}" + "-dropout" * bool(dropout)
    return Case("attention", name, make(kind, count, longest, half, dropout, *heads))


def make(
    kind: str,
    sequences: int,
    longest: int,
    half: str,
    dropout: float,
    heads: int = BASE[0],
    dim: int = BASE[1],
) -> Callable[[str, torch.dtype], Problem]:
    def build(where: str, dtype: torch.dtype) -> Problem:
        lengths = lengths_of(kind, sequences, longest)
        tokens = sum(lengths)
        ids = torch.zeros(tokens, dtype=torch.int64, device=where)
        batch = PackedBatch.from_flat(ids, lengths)
        qkv = leaf(tokens, 3, heads, dim, where=where, dtype=dtype)
        dout = torch.randn(tokens, heads, dim, device=where).to(dtype)
        seed = torch.randint(2**62, (1,), device=where) if dropout else None

        def ours(x: Tensor) -> Tensor:
            return ops.attention(
                x, batch.cu_seqlens, batch.max_seqlen, dropout_p=dropout, dropout_seed=seed
            )[0]

        padded, chosen = _padded_peers(batch, qkv, dout, half, dropout)
        peers = padded | _packed_peers(batch, qkv, dout, half, dropout)
        others, checks = {}, {}
        if qkv.is_cuda:
            others["fastbert cuda"] = by_backend("cuda", half_of(half, ours, [qkv], dout))
            checks["fastbert cuda"] = by_backend(
                "cuda", lambda: _check(batch, qkv, dout, ids, half)
            )
            if half != "fwd":
                others |= _other_backwards(ours, qkv, dout, half, dropout, batch.max_seqlen)
            elif _has_wgmma(qkv):
                name = "fastbert cuda mma.sync"
                others[name] = _without_wgmma(others["fastbert cuda"])
                checks[name] = _without_wgmma(checks["fastbert cuda"])
        if qkv.is_cuda and dropout:
            masked = _by_mask(batch, qkv, dout, half, dropout, seed)
            others["fastbert packed mask"] = masked
            checks["fastbert packed mask"] = lambda: _same(masked, half_of(half, ours, [qkv], dout))
        if qkv.is_cuda and min(lengths) < longest:
            others |= _other_order(half_of(half, ours, [qkv], dout), lengths, qkv.element_size())
        counted = work.attention(lengths, heads, dim, qkv.element_size(), half)
        return Problem(
            half_of(half, ours, [qkv], dout),
            peers,
            counted.bytes,
            counted.flops,
            lambda: _check(batch, qkv, dout, ids),
            others,
            checks,
            half,
            {"torch SDPA": chosen},
        )

    return build


def _check(batch: PackedBatch, qkv: Tensor, dout: Tensor, ids: Tensor) -> Parity:
    """Of the first two sequences, without dropout, whose bits the tests compare."""
    few = batch.lengths[:2]
    part = qkv[: sum(few)].detach().requires_grad_()
    small = PackedBatch.from_flat(ids[: sum(few)], few)
    oracle = part.detach().double().requires_grad_()
    scale = qkv.shape[3] ** -0.5

    def plain(x: Tensor) -> Tensor:
        pieces = []
        for one in x.split(list(few)):
            a, b, c = one.permute(1, 2, 0, 3)
            p = ((a @ b.mT).float() if x.dtype != torch.float64 else a @ b.mT) * scale
            pieces.append((p.softmax(-1).to(x.dtype) @ c).transpose(0, 1))
        return torch.cat(pieces)

    dy = dout[: sum(few)]
    mine, _ = ops.attention(part, small.cu_seqlens, small.max_seqlen)
    return compare(
        grads(mine, dy, [part]),
        grads(plain(part), dy, [part]),
        grads(plain(oracle), dy.double(), [oracle]),
    )


def _by_mask(
    batch: PackedBatch, qkv: Tensor, dout: Tensor, half: str, dropout: float, seed: Tensor | None
) -> Run:
    """Ours with dropout from a packed mask, which forward makes, in its time, and backward reads
    again."""
    from fastbert.kernels import _attention_dropout, attention

    x, longest, heads = qkv.detach(), batch.max_seqlen, qkv.shape[2]
    site = (batch.cu_seqlens, longest, qkv.shape[3] ** -0.5, dropout, seed, 0, None)

    def forward() -> tuple[Tensor, ...]:
        mask = _attention_dropout.dropout_mask(
            batch.cu_seqlens, longest, len(x), heads, dropout, seed, 0
        )
        return *attention.forward(x, *site, mask), mask

    def backward(out: Tensor, lse: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (attention.backward(dout, x, out, lse, *site, mask),)

    if half == "fwd":
        return lambda: forward()[0]
    if half == "fwd-bwd":
        return lambda: backward(*forward())
    kept = forward()
    return lambda: backward(*kept)


def _other_order(run: Run, lengths: list[int], itemsize: int) -> dict[str, Run]:
    """Ours with its tiles in the order that ``_attention_config.longest_first`` does not take, by
    the name of that."""
    from fastbert.kernels import _attention_config

    sizes = sum(lengths), len(lengths), max(lengths), itemsize
    chosen = _attention_config.longest_first(*sizes)

    def call() -> Any:
        choice = _attention_config.longest_first
        _attention_config.longest_first = lambda *sizes: not chosen
        try:
            return run()
        finally:
            _attention_config.longest_first = choice

    return {f"fastbert {'as they come' if chosen else 'longest first'}": call}


def _same(run: Run, other: Run) -> Parity:
    """Of two calls that return a tensor or a tuple of one."""
    first, second = (x if isinstance(x, Tensor) else x[0] for x in (run(), other()))
    return equality(torch.equal(first, second))


def _has_wgmma(qkv: Tensor) -> bool:
    """Whether the cuda backend multiplies with wgmma here, and so could with mma.sync."""
    if _native.cuda_reason() is not None or qkv.dtype == torch.float32:
        return False
    with torch.cuda.device(qkv.device):
        return qkv.shape[3] in (64, 128) and _native.cuda().has_wgmma()


def _without_wgmma(run: Run) -> Run:
    def call() -> Any:
        before = _native.cuda().allow_wgmma(False)
        try:
            return run()
        finally:
            _native.cuda().allow_wgmma(before)

    return call


def _padded_peers(
    batch: PackedBatch, qkv: Tensor, dout: Tensor, half: str, dropout: float
) -> tuple[dict[str, Run], str]:
    """torch's SDPA on padded (B, N, S, D), as it chooses, by each of its backends, and written out
    in flex_attention; and the name of the backend that it chooses."""
    count, (heads, dim) = len(batch.lengths), qkv.shape[2:]
    padded = batch.unpack(qkv.detach().flatten(1)).view(count, -1, 3, heads, dim)
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in padded.unbind(2))
    dpadded = batch.unpack(dout.flatten(1)).view(count, -1, heads, dim).transpose(1, 2)
    mask = None
    if min(batch.lengths) < batch.max_seqlen:
        real = torch.ones(batch.num_tokens, 1, device=qkv.device)
        mask = batch.unpack(real).bool().squeeze(-1)[:, None, None, :]
    backends: dict[str, Any] = {"torch SDPA": None}
    if qkv.is_cuda:
        kinds = torch.nn.attention.SDPBackend
        backends |= {
            "cuDNN": kinds.CUDNN_ATTENTION,
            "SDPA flash": kinds.FLASH_ATTENTION,
            "SDPA memory-efficient": kinds.EFFICIENT_ATTENTION,
        }
    peers = {}
    for name, backend in backends.items():

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: Any = backend) -> Tensor:
            chosen = contextlib.nullcontext()
            if backend is not None:
                chosen = torch.nn.attention.sdpa_kernel(backend)
            with chosen:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

        peers[name] = half_of(half, sdpa, [q, k, v], dpadded)
    if qkv.is_cuda and not dropout:  # which it has none of
        peers["flex_attention"] = half_of(half, _flex(batch), [q, k, v], dpadded)
    with torch.set_grad_enabled(half != "fwd"):
        choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, dropout_p=dropout)
    return peers, torch.nn.attention.SDPBackend(choice).name


def _flex(batch: PackedBatch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flex_attention among the real keys of each padded sequence."""
    flex = compiled(flex_attention)
    mask = None
    if min(batch.lengths) < batch.max_seqlen:
        lengths = torch.tensor(batch.lengths, device=batch.cu_seqlens.device)
        mask = create_block_mask(
            lambda b, h, query, key: key < lengths[b],
            len(batch.lengths), None, batch.max_seqlen, batch.max_seqlen, str(lengths.device),
        )  # fmt: skip
    return lambda q, k, v: flex(q, k, v, block_mask=mask)


def _packed_peers(
    batch: PackedBatch, qkv: Tensor, dout: Tensor, half: str, dropout: float
) -> dict[str, Run]:
    """Kernels that take packed sequences, where they are to be had: 16 bits, CUDA."""
    if not qkv.is_cuda or qkv.dtype == torch.float32:
        return {}
    cu, longest = batch.cu_seqlens, batch.max_seqlen
    inputs = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(1)]
    peers = {}
    flash = found("flash_attn:flash_attn_varlen_qkvpacked_func")
    if flash is not None:
        packed = qkv.detach().requires_grad_()
        peers["flash-attn 2 varlen"] = half_of(
            half, lambda x: flash(x, cu, longest, dropout_p=dropout), [packed], dout
        )
    # Built from its sources it has its backward, from the wheel fa3-fwd the forward alone.
    hopper = found("flash_attn_interface:flash_attn_varlen_func")
    if hopper is None and half == "fwd":
        hopper = found("fa3_fwd_interface:flash_attn_varlen_func")
    if hopper is not None and not dropout:

        def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = hopper(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest)
            return out[0] if isinstance(out, tuple) else out

        peers["flash-attn 3 varlen"] = half_of(half, flash3, inputs, dout)
    varlen = found("torch.nn.attention.varlen:varlen_attn")
    if varlen is not None and not dropout:
        peers["torch varlen_attn"] = half_of(
            half, lambda q, k, v: varlen(q, k, v, cu, cu, longest, longest), inputs, dout
        )
    return peers


def _other_backwards(
    ours: Callable[[Tensor], Tensor],
    qkv: Tensor, dout: Tensor, half: str, dropout: float, longest: int,
) -> dict[str, Run]:  # fmt: skip
    """Our backwards that ``_attention_config.bwd`` does not take here, by the name of each."""
    from fastbert.kernels import _attention, _attention_config, attention

    kind = _attention.kind(qkv, dropout, None)
    short = _attention_config.bwd_short(*kind)
    serves = {
        "two_kernels": True,
        "short": short is not None and longest <= short.block_m,
        "one_pass": _attention_config.bwd_one_pass(*kind) is not None,
    }
    default = _attention_config.bwd(longest, *kind)

    def by(way: str) -> Run:
        run = half_of(half, ours, [qkv], dout)

        def call() -> Any:
            taken = attention.BACKWARDS[default]
            attention.BACKWARDS[default] = attention.BACKWARDS[way]
            try:
                return run()
            finally:
                attention.BACKWARDS[default] = taken

        return call

    # Looked up here: what stands under a name changes while another way runs.
    return {f"fastbert {way}": by(way) for way, can in serves.items() if can and way != default}
