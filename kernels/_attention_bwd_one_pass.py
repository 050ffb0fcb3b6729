"""Attention backward in one kernel over several key tiles, for sequences of at most 512 or so.

One program walks a whole (sequence, head), keys in the outer loop, queries in the inner one, so
that each score is computed once: 5 products, one exp and one set of dropout words where two kernels
take 7, two and two. dK and dV of a key tile stay in registers (Dao, FlashAttention-2, arXiv
2307.08691, algorithm 2). What a key tile adds to dQ goes to an fp32 workspace that no other program
touches: the sum needs no atomics, the same inputs give the same bits, and what the programs in
flight have there, 512 x 64 x 4 bytes each, stays in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention, _attention_config, _attention_dropout
from fastbert.kernels._attention_tile_list import WHOLE_SEQUENCE


@triton.jit(do_not_specialize=["num_tokens", "dropout_threshold", "dropout_offset"])
def _attention_bwd_one_pass_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    delta_ptr,
    dq_sum_ptr,
    tile_list_ptr,
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
    """dQ, dK and dV of one head of one sequence; its place as ``_attention.listed_tile`` has it.

    dout_ptr, out_ptr: (num_tokens, num_heads, HEAD_DIM).  qkv_ptr, dqkv_ptr: (num_tokens, 3,
    num_heads, HEAD_DIM).  lse_ptr: fp32 (num_heads, num_tokens).  delta_ptr, dq_sum_ptr: fp32
    (num_heads, num_tokens) and (num_heads, num_tokens, HEAD_DIM), workspaces.  tile_list_ptr: of
    whole sequences.  BLOCK_M: queries a step.  BLOCK_N: keys a step.  All else as in forward.
    """
    first, length, _, head = _attention.listed_tile(tile_list_ptr, num_heads)
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    q_ptr = qkv_ptr + head_offset
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    dq_ptr = dqkv_ptr + head_offset
    dk_ptr = dq_ptr + stride_part
    dv_ptr = dk_ptr + stride_part
    out_offset = first * stride_part + head * HEAD_DIM
    statistics_offset = head.to(tl.int64) * num_tokens + first
    dq_sum_head_ptr = dq_sum_ptr + statistics_offset * HEAD_DIM
    score_scale = softmax_scale * 1.4426950408889634  # log2(e)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride_head + first * bias_width

    for key_start in range(0, length, BLOCK_N):
        # The first key tile starts the sums of dQ and the last one ends them: for so many rows.
        first_rows = tl.where(key_start == 0, length, 0)
        last_rows = tl.where(key_start + BLOCK_N >= length, length, 0)
        keys = key_start + tl.arange(0, BLOCK_N)
        k = _attention.load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _attention.load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for query_start in range(0, length, BLOCK_M):
            queries = query_start + tl.arange(0, BLOCK_M)
            q = _attention.load_tile(q_ptr, queries, length, stride_token, HEAD_DIM, BLOCK_D)
            dout = _attention.load_tile(
                dout_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D
            )
            row_delta_ptr = delta_ptr + statistics_offset + queries
            if key_start == 0:
                out = _attention.load_tile(
                    out_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D
                )
                delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
                tl.store(row_delta_ptr, delta, mask=queries < length)
            else:
                delta = tl.load(row_delta_ptr, mask=queries < length, other=0.0)
            # An infinite lse makes the probabilities of queries past the end exactly 0.
            lse_row_ptr = lse_ptr + statistics_offset + queries
            lse = tl.load(lse_row_ptr, mask=queries < length, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale
            if bias_ptr is not None:
                s += _attention.load_bias(
                    bias_ptr, queries[None, :], keys[:, None], length, bias_width
                )
                lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query that sees no key
            p = tl.exp2(s - (lse * 1.4426950408889634)[None, :])
            # Keys past the end have score 0, whose exp may overflow, and would reach dQ as nan.
            p = tl.where((keys < length)[:, None], p, 0.0)
            if dropout_seed_ptr is not None:
                keep = tl.trans(
                    _attention_dropout.keep_tile(
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
                        key_start,
                        BLOCK_N,
                    )
                )
                # In the sign of p the mask takes no registers while dp is computed.
                p = tl.where(keep, p, -p)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            kept_p = p
            if dropout_seed_ptr is not None:
                dp = tl.where(p < 0.0, 0.0, dp * keep_scale)
                kept_p = tl.where(p < 0.0, 0.0, p)
                p = tl.abs(p)
            dv = tl.dot(kept_p.to(dout.dtype), dout, dv, input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            # dQ^T = K^T dS^T takes both operands from shared memory, none from registers.
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
            dq += _attention.load_tile(
                dq_sum_head_ptr, queries, length - first_rows, HEAD_DIM, HEAD_DIM, BLOCK_D
            )
            _attention.store_tile(
                dq_sum_head_ptr, dq, queries, length - last_rows, HEAD_DIM, HEAD_DIM, BLOCK_D
            )
            _attention.store_tile(
                dq_ptr, dq * softmax_scale, queries, last_rows, stride_token, HEAD_DIM, BLOCK_D
            )
        dk *= softmax_scale
        _attention.store_tile(dk_ptr, dk, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        dv *= keep_scale
        _attention.store_tile(dv_ptr, dv, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        # The next key tile may read delta and the sums by other threads than those that wrote them;
        # a barrier orders the accesses of a block to global memory too.
        tl.debug_barrier()


def one_pass(
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

    longest_first: always so here, where a program is as long as a sequence.
    Raises ValueError where ``_attention_config.bwd_one_pass`` has no tile.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    tile = _attention_config.bwd_one_pass(*_attention.kind(qkv, dropout_p, bias, dropout_mask))
    if tile is None:
        raise ValueError(
            f"qkv: got {qkv.dtype} with head_dim {head_dim}, expected 16 bits and 64, on sm_90 or "
            "sm_100"
        )
    dqkv = torch.empty_like(qkv)
    place = _attention.tiling(cu_seqlens, num_tokens, max_seqlen, num_heads, WHOLE_SEQUENCE, True)
    with torch.cuda.device_of(qkv):
        delta = torch.empty_like(lse)
        dq_sum = lse.new_empty(num_heads, num_tokens, head_dim)
        _attention_bwd_one_pass_kernel[place.grid](
            dout,
            qkv,
            out,
            lse,
            dqkv,
            delta,
            dq_sum,
            place.tile_list,
            *_attention.bias_args(bias),
            *_attention_dropout.dropout_args(dropout_p, dropout_seed, dropout_offset, dropout_mask),
            softmax_scale,
            num_tokens,
            num_heads,
            **_attention.tile_args(head_dim, tile),
        )
    return dqkv
