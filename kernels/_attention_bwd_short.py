"""Attention backward for sequences that are one query tile long, the whole of it in one kernel.

One program takes a whole (sequence, head): its queries stay on the chip while the key tiles pass
by, and since all queries are there, dK and dV of a key tile are complete when it has passed, dQ
when all have. So each score is computed once, with 5 products where two kernels take 7, one exp and
one set of dropout words where they take two, no workspace, and every tensor is read or written
exactly once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention, _attention_config, _attention_dropout


@triton.jit(do_not_specialize=["num_tokens", "dropout_threshold", "dropout_offset"])
def _attention_bwd_short_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    bias_stride_head,
    bias_width,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    dropout_mask_ptr,
    dropout_mask_quads,
    softmax_scale,
    num_tokens,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dQ, dK and dV of one head of one sequence; program sequence * num_heads + head.

    dout_ptr, out_ptr: (num_tokens, num_heads, HEAD_DIM).  qkv_ptr, dqkv_ptr: (num_tokens, 3,
    num_heads, HEAD_DIM).  lse_ptr: fp32 (num_heads, num_tokens).  BLOCK_M: queries, at least the
    longest length.  BLOCK_N: keys a step.  All else as in forward.
    """
    sequence = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    first = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - first
    first = first.to(tl.int64)
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    k_ptr = qkv_ptr + head_offset + stride_part
    v_ptr = k_ptr + stride_part
    dq_ptr = dqkv_ptr + head_offset
    dk_ptr = dq_ptr + stride_part
    dv_ptr = dk_ptr + stride_part
    out_offset = first * stride_part + head * HEAD_DIM

    queries = tl.arange(0, BLOCK_M)
    q = _attention.load_tile(
        qkv_ptr + head_offset, queries, length, stride_token, HEAD_DIM, BLOCK_D
    )
    dout = _attention.load_tile(
        dout_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D
    )
    out = _attention.load_tile(
        out_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D
    )
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    # An infinite lse makes the probabilities of queries past the end exactly 0.
    lse_row = lse_ptr + head.to(tl.int64) * num_tokens + first
    lse = tl.load(lse_row + queries, mask=queries < length, other=float("inf"))
    lse *= 1.4426950408889634  # log2(e)
    score_scale = softmax_scale * 1.4426950408889634
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride_head + first * bias_width
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query that sees no key

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _attention.load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _attention.load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if bias_ptr is not None:
            s += _attention.load_bias(bias_ptr, queries[:, None], keys[None, :], length, bias_width)
        # Keys past the end have score 0, whose exp may overflow, and would reach dQ as nan.
        p = tl.where((keys < length)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        if dropout_seed_ptr is not None:
            keep = _attention_dropout.keep_tile(
                dropout_seed_ptr,
                dropout_threshold,
                dropout_offset,
                dropout_mask_ptr,
                dropout_mask_quads,
                head,
                first,
                queries,
                length,
                num_tokens,
                start,
                BLOCK_N,
            )
            # In the sign of p the mask takes no registers while dp is computed.
            p = tl.where(keep, p, -p)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        kept_p = p
        if dropout_seed_ptr is not None:
            dp = tl.where(p < 0.0, 0.0, dp * keep_scale)
            kept_p = tl.where(p < 0.0, 0.0, p)
            p = tl.abs(p)
        dv = tl.dot(tl.trans(kept_p.to(dout.dtype)), dout, input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        if dropout_seed_ptr is not None:
            dv *= keep_scale
        _attention.store_tile(dv_ptr, dv, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        dk *= softmax_scale
        _attention.store_tile(dk_ptr, dk, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    dq *= softmax_scale
    _attention.store_tile(dq_ptr, dq, queries, length, stride_token, HEAD_DIM, BLOCK_D)


def short(
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
    dropout_mask: torch.Tensor | None = None,
    longest_first: bool = False,
) -> torch.Tensor:
    """dqkv, as ``attention.attention_bwd`` has it; qkv is not empty.

    longest_first: all the same here, where a program takes a sequence and all are short.
    Raises ValueError where ``_attention_config.bwd_short`` has no tile as long as max_seqlen.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    tile = _attention_config.bwd_short(*_attention.kind(qkv, dropout_p, bias, dropout_mask))
    longest = 0 if tile is None else tile.block_m
    if tile is None or max_seqlen > longest:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected at most {longest}")
    dqkv = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        _attention_bwd_short_kernel[((cu_seqlens.shape[0] - 1) * num_heads,)](
            dout,
            qkv,
            out,
            lse,
            dqkv,
            cu_seqlens,
            *_attention.bias_args(bias),
            *_attention_dropout.dropout_args(dropout_p, dropout_seed, dropout_offset, dropout_mask),
            softmax_scale,
            num_tokens,
            num_heads,
            **_attention.tile_args(head_dim, tile),
        )
    return dqkv
