"""attention: bidirectional multi-head self-attention over packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.ops import _check, philox
from fastbert.ops._library import differentiable
from fastbert.ops._registry import OPS

_OP = OPS["attention"]


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    dropout_offset: int = 0,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, eq. 1) inside each sequence.

    For head n and tokens i, j of one sequence: s_ij = softmax_scale * q_i . k_j + bias_nij,
    lse_i = log sum_j exp(s_ij), out_i = sum_j dropout(exp(s_ij - lse_i)) v_j.

    qkv: (T, 3, N, D): query, key, value of every packed token.
    cu_seqlens: int32 (B + 1,), sequence b holds tokens cu_seqlens[b] .. cu_seqlens[b + 1]; equal
        neighbours are an empty sequence.
    max_seqlen: host int, at least the longest length.
    softmax_scale: 1/sqrt(D) when None.
    dropout: on the probabilities, by the Philox stream of ``ops.philox`` (row = packed index of the
        query, column = position of the key in its sequence, plane = head).
    bias: floating (N, T, S), or (1, T, S) for all heads alike, S at least max_seqlen: row = packed
        index of the query, column = position of the key in its sequence; finite, or -inf where the
        query does not see the key. A query that sees no key has out 0, lse -inf and no gradient.
        Structured masks are made of it: causal, blocks, two streams. It gets no gradient.
    Returns out (T, N, D) in qkv's dtype and lse (N, T) in fp32 (fp64 for fp64), not differentiable.
    Softmax in fp32; backward is deterministic: no atomics. No (S, S) matrix reaches memory.
    Raises ValueError for bad shapes, dtypes or dropout_p, for a bias that requires a gradient and,
    on CPU tensors, for offsets that descend, overrun the tokens or exceed max_seqlen.
    """
    _check.activation("qkv", qkv, ("T", 3, "N", "D"))
    _check.offsets(cu_seqlens, max_seqlen, qkv.shape[0], qkv.device)
    _check.dropout(dropout_p, dropout_seed, qkv)
    if bias is not None:
        _check_bias(bias, qkv, max_seqlen)
    scale = qkv.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return _attention(
        qkv, cu_seqlens, max_seqlen, scale, dropout_p, dropout_seed, dropout_offset, bias
    )


def _check_bias(bias: torch.Tensor, qkv: torch.Tensor, max_seqlen: int) -> None:
    tokens, _, heads, _ = qkv.shape
    _check.activation("bias", bias, ("N", tokens, "S"))
    if bias.shape[0] not in (1, heads) or bias.shape[2] < max_seqlen or bias.device != qkv.device:
        raise ValueError(
            f"bias: got {_check.describe(bias)}, expected (1 or {heads}, {tokens}, at least "
            f"{max_seqlen}) on {qkv.device}"
        )
    if bias.requires_grad:
        raise ValueError("bias: got one that requires a gradient, expected a constant")


def attention_reference(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out (T, N, D), lse (N, T) and the probabilities, one (N, S, S) a sequence (after dropout)."""
    statistic = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    bounds = cu_seqlens.tolist()
    outs, lses, dropped = [], [], []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)  # each (N, S, D)
        scores = add_bias((q @ k.transpose(1, 2)).to(statistic) * softmax_scale, bias, start)
        lse = scores.logsumexp(-1) if end > start else scores.new_empty(scores.shape[:2])
        p = probabilities(scores, lse)
        p = drop_probabilities(p, start, dropout_p, dropout_seed, dropout_offset).to(qkv.dtype)
        outs.append((p @ v).transpose(0, 1))
        lses.append(lse)
        dropped.append(p)
    if not outs:
        return qkv[:, 0].clone(), qkv.new_empty(qkv.shape[2], 0, dtype=statistic), []
    return torch.cat(outs), torch.cat(lses, 1), dropped


def add_bias(scores: torch.Tensor, bias: torch.Tensor | None, start: int) -> torch.Tensor:
    """Scores (N, S, S) of the sequence whose first token is ``start`` and its part of ``bias``."""
    length = scores.shape[1]
    if bias is None:
        return scores
    return scores + bias[:, start : start + length, :length].to(scores.dtype)


def probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse): (N, S, S) and (N, S); 0 in the row of a query that sees no key."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def drop_probabilities(
    p: torch.Tensor, start: int, dropout_p: float, seed: torch.Tensor | None, offset: int
) -> torch.Tensor:
    """Dropout of the probabilities (N, S, S) of the sequence whose first token is ``start``."""
    if dropout_p == 0.0:
        return p
    assert seed is not None
    heads, queries, keys = (torch.arange(size, device=p.device) for size in p.shape)
    plane, row, col = heads[:, None, None], start + queries[:, None], keys
    keep = philox.keep_mask(seed, offset, dropout_p, plane, row, col)
    return torch.where(keep, p * (1.0 / (1.0 - dropout_p)), 0.0)


def _forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _OP.launcher("fwd", qkv, qkv.shape[3], bias is not None)(
        qkv, cu_seqlens, max_seqlen, softmax_scale,
        dropout_p, dropout_seed, dropout_offset, bias,
    )  # fmt: skip


def _fake(qkv: torch.Tensor, *ignored: Any) -> tuple[torch.Tensor, torch.Tensor]:
    statistic = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=statistic)


def _backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return _OP.launcher("bwd", qkv, qkv.shape[3], bias is not None)(
        dout.contiguous(), qkv, out, lse, cu_seqlens, max_seqlen, softmax_scale,
        dropout_p, dropout_seed, dropout_offset, bias,
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.dropout_p, seed, ctx.dropout_offset, bias = (
        inputs
    )
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed, bias)


def _gradients(ctx: Any, backward: Any, dout: torch.Tensor, *ignored: Any) -> Any:
    qkv, out, lse, cu_seqlens, seed, bias = ctx.saved_tensors
    dqkv = backward(
        dout, qkv, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale,
        ctx.dropout_p, seed, ctx.dropout_offset, bias,
    )  # fmt: skip
    return dqkv, *(None,) * 7


_TAIL = (
    "Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, float dropout_p, "
    "Tensor? dropout_seed, int dropout_offset, Tensor? bias=None"
)
_attention = differentiable(
    "attention",
    schema=f"(Tensor qkv, {_TAIL}) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    backward_schema=f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_TAIL}) -> Tensor",
    backward=_backward,
    backward_fake=lambda dout, qkv, *ignored: torch.empty_like(qkv),
    save=_save,
    gradients=_gradients,
)
