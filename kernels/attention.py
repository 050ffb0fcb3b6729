"""attention: softmax(scale Q K^T) V for packed sequences, QKV packed in and out.

Vaswani et al., arXiv 1706.03762, eq. 1, tiled with an online softmax (Dao, FlashAttention-2, arXiv
2307.08691). No length is read on the host: the grid covers every sequence with tiles for
``max_seqlen`` tokens, and programs past a sequence's end return at once; or the device lists the
tiles, longest sequence first (``_attention_config.longest_first``). Backward recomputes the
probabilities from ``lse``, in one of three ways (``_attention_config.bwd``), none with atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastbert.kernels import _attention, _attention_config, _attention_dropout
from fastbert.kernels._attention_bwd import two_kernels
from fastbert.kernels._attention_bwd_one_pass import one_pass
from fastbert.kernels._attention_bwd_short import short

LOG2_E = math.log2(math.e)

BACKWARDS = {"two_kernels": two_kernels, "short": short, "one_pass": one_pass}


@triton.jit(
    do_not_specialize=["num_tokens", "tiles_per_sequence", "dropout_threshold", "dropout_offset"]
)
def _attention_fwd_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
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
    score_scale,
    num_tokens,
    num_heads,
    tiles_per_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query tile of one head: out and lse; its place as ``_attention.find_tile`` has it.

    qkv_ptr: (num_tokens, 3, num_heads, HEAD_DIM).  out_ptr: (num_tokens, num_heads, HEAD_DIM).
    lse_ptr: fp32 (num_heads, num_tokens).  cu_seqlens_ptr: int32 (B + 1,).  tile_list_ptr: for
    tiles of BLOCK_M, or None.  bias_ptr, bias_stride_head, bias_width: see
    ``_attention.bias_args``.  dropout_seed_ptr to dropout_mask_quads: see
    ``_attention_dropout.dropout_args``; no dropout without a seed.  score_scale: softmax_scale
    log2(e).  tiles_per_sequence: query tiles for the longest sequence.  BLOCK_M: queries.  BLOCK_N:
    keys a step.  BLOCK_D: HEAD_DIM padded to a power of two.
    """
    first, length, tile, head = _attention.find_tile(
        cu_seqlens_ptr, tile_list_ptr, tiles_per_sequence, num_heads
    )
    if tile * BLOCK_M >= length:
        return
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    q_ptr = qkv_ptr + first * stride_token + head * HEAD_DIM
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride_head + first * bias_width

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _attention.load_tile(q_ptr, queries, length, stride_token, HEAD_DIM, BLOCK_D)
    # Scores are in units of log2: exp2 is one instruction, and the scale is folded into one FMA.
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _attention.load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _attention.load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if bias_ptr is not None:
            s += _attention.load_bias(bias_ptr, queries[:, None], keys[None, :], length, bias_width)
        s = tl.where((keys < length)[None, :], s, float("-inf"))
        updated = tl.maximum(largest, tl.max(s, 1))
        shift = updated
        if bias_ptr is not None:  # a row that sees no key yet: its probabilities are 0, not nan
            shift = tl.where(updated == float("-inf"), 0.0, updated)
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, 1)
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
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = updated

    if tile_list_ptr is not None:
        first, length, tile, head = _attention.listed_tile(tile_list_ptr, num_heads, AGAIN=True)
        queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    divisor = total
    if bias_ptr is not None:
        divisor = tl.where(total == 0.0, 1.0, total)
    out = acc * (keep_scale / divisor)[:, None]
    out_row = out_ptr + first * stride_part + head * HEAD_DIM
    _attention.store_tile(out_row, out, queries, length, stride_part, HEAD_DIM, BLOCK_D)
    lse = (largest + tl.log2(total)) * 0.6931471805599453  # log(2)
    lse_row = lse_ptr + head.to(tl.int64) * num_tokens + first
    tl.store(lse_row + queries, lse, mask=queries < length)


def attention_fwd(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_i = sum_j dropout(p_ij) v_j, p_ij = exp(s_ij - lse_i), s_ij = scale q_i . k_j + bias_ij.

    qkv: (T, 3, N, D) contiguous fp32, bf16 or fp16, D <= 256.  cu_seqlens: int32 (B + 1,) on the
    device.  max_seqlen: host int, at least the longest length.  softmax_scale, dropout_p: floats.
    dropout_seed: int64 (1,) on the device, or None.  dropout_offset: the site.  bias: contiguous
    floating (1 or N, T, W), W at least max_seqlen: a row for each query, a column for each position
    of a key in its sequence, -inf where it is not seen; or None.
    Returns out (T, N, D) in qkv.dtype and lse (N, T) fp32, 0 and -inf for a query that sees no key,
    whose gradient is 0 too. Sums are in fp32; probabilities are
    rounded to qkv.dtype before they meet V.
    """
    dropout = (dropout_p, dropout_seed, dropout_offset)
    mask = _attention_dropout.chosen_mask(qkv, cu_seqlens, max_seqlen, *dropout)
    site = (cu_seqlens, max_seqlen, softmax_scale, *dropout, bias, mask)
    return forward(qkv, *site, _attention.longest_first(qkv, cu_seqlens, max_seqlen))


def forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    longest_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention_fwd`` with the dropout of a mask of ``_attention_dropout.dropout_mask``, or, for
    None, of Philox in the kernel; its tiles as they come or longest sequence first."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=qkv.device)
    if qkv.numel() == 0:
        return out, lse
    tile = _attention_config.tiles(*_attention.kind(qkv, dropout_p, bias, dropout_mask)).fwd
    place = _attention.tiling(
        cu_seqlens, num_tokens, max_seqlen, num_heads, tile.block_m, longest_first
    )
    with torch.cuda.device_of(qkv):
        _attention_fwd_kernel[place.grid](
            qkv,
            out,
            lse,
            cu_seqlens,
            place.tile_list,
            *_attention.bias_args(bias),
            *_attention_dropout.dropout_args(dropout_p, dropout_seed, dropout_offset, dropout_mask),
            softmax_scale * LOG2_E,
            num_tokens,
            num_heads,
            place.tiles_per_sequence,
            **_attention.tile_args(head_dim, tile),
        )
    return out, lse


def attention_bwd(
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
    """delta_i = dout_i . out_i; dp = dropout'(dout v^T); ds = p (dp - delta); dq = scale ds k;
    dk = scale ds^T q; dv = dropout(p)^T dout.

    dout, out: (T, N, D) contiguous.  lse: (N, T) fp32.  All else as in forward.
    Returns dqkv (T, 3, N, D) in qkv.dtype.
    """
    dropout = (dropout_p, dropout_seed, dropout_offset)
    mask = _attention_dropout.chosen_mask(qkv, cu_seqlens, max_seqlen, *dropout)
    site = (cu_seqlens, max_seqlen, softmax_scale, *dropout, bias)
    longest_first = _attention.longest_first(qkv, cu_seqlens, max_seqlen)
    return backward(dout, qkv, out, lse, *site, mask, longest_first)


def backward(
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
    bias: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    longest_first: bool = False,
) -> torch.Tensor:
    """``attention_bwd`` with the mask of ``forward``, or None, and its order."""
    if qkv.numel() == 0:
        return torch.empty_like(qkv)
    way = _attention_config.bwd(max_seqlen, *_attention.kind(qkv, dropout_p, bias, dropout_mask))
    return BACKWARDS[way](
        dout,
        qkv,
        out,
        lse,
        cu_seqlens,
        max_seqlen,
        softmax_scale,
        dropout_p,
        dropout_seed,
        dropout_offset,
        bias,
        dropout_mask,
        longest_first,
    )
