"""Attention of BERT's shapes: dense, evenly spaced and Wikipedia-like lengths, dropout or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from problem import Case, Problem, Run, Tensor, found, grads, half_of, leaf, lengths_of, ratio

from fastbert import ops
from fastbert.packed import PackedBatch

DIM = 64


def cases(where: str, tokens: int) -> Iterator[Case]:
    for kind, longest in (("dense", 128), ("dense", 512), ("ragged", 512), ("wikipedia", 512)):
        count = tokens // longest * (1 if kind == "dense" else 2)
        halves = ("fwd", "bwd", "fwd-bwd") if where == "cuda" else ("fwd", "fwd-bwd")
        for half in halves:
            for dropout in (0.0, 0.1) if where == "cuda" else (0.0,):
                name = f"base-{kind}-{count}x{longest}-{half}" + "-dropout" * bool(dropout)
                yield Case("attention", name, make(kind, count, longest, half, dropout))
    if where == "cpu":
        count = tokens // 512
        name = f"base-dense-{count}x512-fwd-bwd-dropout"
        yield Case("attention", name, make("dense", count, 512, "fwd-bwd", 0.1))


def make(
    kind: str, sequences: int, longest: int, half: str, dropout: float, heads: int = 12
) -> Callable[[str, torch.dtype], Problem]:
    def build(where: str, dtype: torch.dtype) -> Problem:
        lengths = lengths_of(kind, sequences, longest)
        tokens = sum(lengths)
        ids = torch.zeros(tokens, dtype=torch.int64, device=where)
        batch = PackedBatch.from_flat(ids, lengths)
        qkv = leaf(tokens, 3, heads, DIM, where=where, dtype=dtype)
        dout = torch.randn(tokens, heads, DIM, device=where).to(dtype)
        seed = torch.randint(2**62, (1,), device=where) if dropout else None

        def ours(x: Tensor) -> Tensor:
            return ops.attention(
                x, batch.cu_seqlens, batch.max_seqlen, dropout_p=dropout, dropout_seed=seed
            )[0]

        peers = {
            **_padded_peers(batch, qkv, dout, half, dropout),
            **_packed_peers(batch, qkv, dout, half, dropout),
        }
        others = {}
        if half != "fwd" and qkv.is_cuda:
            others = _other_backwards(ours, qkv, dout, half, dropout, batch.max_seqlen)
        elements = tokens * heads * DIM
        products = {"fwd": 2, "bwd": 5, "fwd-bwd": 7}[half]
        moved = {"fwd": 4, "bwd": 8, "fwd-bwd": 12}[half]
        return Problem(
            half_of(half, ours, [qkv], dout),
            peers,
            moved * elements * qkv.element_size(),
            products * 2 * heads * DIM * sum(n * n for n in lengths),
            lambda: _check(batch, qkv, dout, ids),
            others,
        )

    return build


def _check(batch: PackedBatch, qkv: Tensor, dout: Tensor, ids: Tensor) -> float:
    """Of the first two sequences, without dropout, whose bits the tests compare."""
    few = batch.lengths[:2]
    part = qkv[: sum(few)].detach().requires_grad_()
    small = PackedBatch.from_flat(ids[: sum(few)], few)
    oracle = part.detach().double().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        pieces = []
        for one in x.split(list(few)):
            a, b, c = one.permute(1, 2, 0, 3)
            p = ((a @ b.mT).float() if x.dtype != torch.float64 else a @ b.mT) * DIM**-0.5
            pieces.append((p.softmax(-1).to(x.dtype) @ c).transpose(0, 1))
        return torch.cat(pieces)

    dy = dout[: sum(few)]
    mine, _ = ops.attention(part, small.cu_seqlens, small.max_seqlen)
    return ratio(
        grads(mine, dy, [part]),
        grads(plain(part), dy, [part]),
        grads(plain(oracle), dy.double(), [oracle]),
    )


def _padded_peers(
    batch: PackedBatch, qkv: Tensor, dout: Tensor, half: str, dropout: float
) -> dict[str, Run]:
    """torch's SDPA on padded (B, N, S, D), as it chooses and by each of its backends."""
    count, heads = len(batch.lengths), qkv.shape[2]
    padded = batch.unpack(qkv.detach().flatten(1)).view(count, -1, 3, heads, DIM)
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in padded.unbind(2))
    dpadded = batch.unpack(dout.flatten(1)).view(count, -1, heads, DIM).transpose(1, 2)
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
    return peers


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
    hopper = found("flash_attn_interface:flash_attn_varlen_func")
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
    """Our backwards that ``_config.attention_bwd`` does not take here, by the name of each."""
    from fastbert.kernels import _attention, _config, attention

    kind = _attention.kind(qkv, dropout, None)
    short = _config.attention_bwd_short(*kind)
    serves = {
        "two_kernels": True,
        "short": short is not None and longest <= short.block_m,
        "one_pass": _config.attention_bwd_one_pass(*kind) is not None,
    }
    default = _config.attention_bwd(longest, *kind)

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
