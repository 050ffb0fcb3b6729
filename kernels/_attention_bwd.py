"""Attention backward in two kernels, with no limit on the sequence length.

Both recompute the probabilities from ``lse``: one kernel a query tile gives dQ, one a key tile
gives dK and dV (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2, its loop split so that each
element is written by one program: nothing is atomic, and the same inputs give the same bits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention, _attention_config, _attention_dropout


@triton.jit(
    do_not_specialize=["num_tokens", "tiles_per_sequence", "dropout_threshold", "dropout_offset"]
)
def _attention_bwd_dq_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
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
    tiles_per_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dQ of one query tile of one head, and its delta_i = sum over d of dout_id out_id.

    dout_ptr, out_ptr: (num_tokens, num_heads, HEAD_DIM).  qkv_ptr, dqkv_ptr: (num_tokens, 3,
    num_heads, HEAD_DIM).  lse_ptr, delta_ptr: fp32 (num_heads, num_tokens), delta written here.
    softmax_scale: as given.  All else as in forward.
    """
    first, length, tile, head = _attention.find_tile(
        cu_seqlens_ptr, tile_list_ptr, tiles_per_sequence, num_heads
    )
    if tile * BLOCK_M >= length:
        return
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    k_ptr = qkv_ptr + head_offset + stride_part
    v_ptr = k_ptr + stride_part
    out_offset = first * stride_part + head * HEAD_DIM
    statistics_offset = head.to(tl.int64) * num_tokens + first

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
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
    tl.store(delta_ptr + statistics_offset + queries, delta, mask=queries < length)
    lse = tl.load(lse_ptr + statistics_offset + queries, mask=queries < length, other=0.0)
    lse *= 1.4426950408889634  # log2(e)
    score_scale = softmax_scale * 1.4426950408889634
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride_head + first * bias_width
        # A query that sees no key: an infinite lse makes its probabilities 0.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _attention.load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _attention.load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if bias_ptr is not None:
            s += _attention.load_bias(bias_ptr, queries[:, None], keys[None, :], length, bias_width)
        p = tl.where((keys < length)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
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
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr = dqkv_ptr + head_offset
    _attention.store_tile(
        dq_ptr, dq * softmax_scale, queries, length, stride_token, HEAD_DIM, BLOCK_D
    )


@triton.jit(
    do_not_specialize=["num_tokens", "tiles_per_sequence", "dropout_threshold", "dropout_offset"]
)
def _attention_bwd_dkdv_kernel(
    dout_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
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
    tiles_per_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dK and dV of one key tile of one head.

    Scores are computed transposed, (keys, queries), so that they are the left operand of both sums
    over queries. BLOCK_M: queries a step.  BLOCK_N: keys of the program.  tile_list_ptr: for tiles
    of BLOCK_N, or None.  tiles_per_sequence: key tiles for the longest sequence.  All else as in
    the dQ kernel, which has written delta.
    """
    first, length, tile, head = _attention.find_tile(
        cu_seqlens_ptr, tile_list_ptr, tiles_per_sequence, num_heads
    )
    if tile * BLOCK_N >= length:
        return
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    q_ptr = qkv_ptr + head_offset
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    dout_head_ptr = dout_ptr + first * stride_part + head * HEAD_DIM
    statistics_offset = head.to(tl.int64) * num_tokens + first
    score_scale = softmax_scale * 1.4426950408889634  # log2(e)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride_head + first * bias_width

    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _attention.load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    v = _attention.load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q = _attention.load_tile(q_ptr, queries, length, stride_token, HEAD_DIM, BLOCK_D)
        dout = _attention.load_tile(dout_head_ptr, queries, length, stride_part, HEAD_DIM, BLOCK_D)
        # An infinite lse makes the probabilities of queries past the end exactly 0.
        mask = queries < length
        lse = tl.load(lse_ptr + statistics_offset + queries, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + statistics_offset + queries, mask=mask, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale
        if bias_ptr is not None:
            s += _attention.load_bias(bias_ptr, queries[None, :], keys[:, None], length, bias_width)
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query that sees no key
        p = tl.exp2(s - (lse * 1.4426950408889634)[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dropped_p = p
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
                    tile * BLOCK_N,
                    BLOCK_N,
                )
            )
            dropped_p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped_p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    if tile_list_ptr is not None:
        first, length, tile, head = _attention.listed_tile(tile_list_ptr, num_heads, AGAIN=True)
        head_offset = first * stride_token + head * HEAD_DIM
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dk_ptr = dqkv_ptr + head_offset + stride_part
    _attention.store_tile(dk_ptr, dk * softmax_scale, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    dv_ptr = dk_ptr + stride_part
    _attention.store_tile(dv_ptr, dv * keep_scale, keys, length, stride_token, HEAD_DIM, BLOCK_D)


def two_kernels(
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
    """dqkv, as ``attention.attention_bwd`` has it; qkv is not empty."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    dq_tile, dkdv_tile = _attention_config.tiles(
        *_attention.kind(qkv, dropout_p, bias, dropout_mask)
    )[1:]
    delta = torch.empty_like(lse)
    bias_args = _attention.bias_args(bias)
    dropout = _attention_dropout.dropout_args(dropout_p, dropout_seed, dropout_offset, dropout_mask)
    sequences = (cu_seqlens, num_tokens, max_seqlen, num_heads)
    place = _attention.tiling(*sequences, dq_tile.block_m, longest_first)
    with torch.cuda.device_of(qkv):
        _attention_bwd_dq_kernel[place.grid](
            dout,
            qkv,
            out,
            lse,
            delta,
            dqkv,
            cu_seqlens,
            place.tile_list,
            *bias_args,
            *dropout,
            softmax_scale,
            num_tokens,
            num_heads,
            place.tiles_per_sequence,
            **_attention.tile_args(head_dim, dq_tile),
        )
        if dkdv_tile.block_n != dq_tile.block_m:
            place = _attention.tiling(*sequences, dkdv_tile.block_n, longest_first)
        _attention_bwd_dkdv_kernel[place.grid](
            dout,
            qkv,
            lse,
            delta,
            dqkv,
            cu_seqlens,
            place.tile_list,
            *bias_args,
            *dropout,
            softmax_scale,
            num_tokens,
            num_heads,
            place.tiles_per_sequence,
            **_attention.tile_args(head_dim, dkdv_tile),
        )
    return dqkv
