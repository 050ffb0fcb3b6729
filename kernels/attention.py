"""attention: softmax(scale Q K^T) V for packed sequences, QKV packed in and out.

Vaswani et al., arXiv 1706.03762, eq. 1, tiled with an online softmax (Dao, FlashAttention-2, arXiv
2307.08691). Backward recomputes the probabilities from ``lse``: one kernel a query tile gives dQ,
one a key tile gives dK and dV; each element is written by one program, so nothing is atomic and the
same inputs give the same bits.

Layout: ``qkv`` is (T, 3, N, D), so one token's query, key and value rows lie in one row of
3 N D elements, and a head's tile is read in place. The grid covers every sequence with tiles for
``max_seqlen`` tokens; programs past a sequence's end return at once, so no length is read on the
host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config, _philox

LOG2_E = math.log2(math.e)


@triton.jit
def _find_tile(cu_seqlens_ptr, tiles_per_sequence):
    """This program's sequence: its first token (int64) and length, and the tile in it."""
    sequence = tl.program_id(0) // tiles_per_sequence
    tile = tl.program_id(0) % tiles_per_sequence
    first = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - first
    return first.to(tl.int64), length, tile


@triton.jit
def _load_tile(ptr, rows, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head as a (rows, BLOCK_D) tile, 0 past the sequence's end and past HEAD_DIM.

    ptr: the sequence's first row.  rows: (BLOCK,) positions.  stride_row: elements between rows.
    """
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride_row + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, x, rows, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Counterpart of ``_load_tile``."""
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride_row + dims[None, :], x, mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "tiles_per_sequence", "dropout_threshold", "dropout_offset"]
)
def _attention_fwd_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    score_scale,
    num_tokens,
    num_heads,
    tiles_per_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query tile of one head: out and lse; program (sequence and tile, head).

    qkv_ptr: (num_tokens, 3, num_heads, HEAD_DIM).  out_ptr: (num_tokens, num_heads, HEAD_DIM).
    lse_ptr: fp32 (num_heads, num_tokens).  cu_seqlens_ptr: int32 (B + 1,).  dropout_seed_ptr: int64
    seed, None without dropout.  dropout_threshold, dropout_offset, keep_scale: see
    ``_philox.Dropout``.  score_scale: softmax_scale log2(e).  tiles_per_sequence: query tiles for
    the longest sequence.  BLOCK_M: queries.  BLOCK_N: keys a step.  BLOCK_D: HEAD_DIM padded to a
    power of two.
    """
    first, length, tile = _find_tile(cu_seqlens_ptr, tiles_per_sequence)
    if tile * BLOCK_M >= length:
        return
    head = tl.program_id(1)
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    q_ptr = qkv_ptr + first * stride_token + head * HEAD_DIM
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_tile(q_ptr, queries, length, stride_token, HEAD_DIM, BLOCK_D)
    # Scores are in units of log2: exp2 is one instruction, and the scale is folded into one FMA.
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        s = tl.where((keys < length)[None, :], s, float("-inf"))
        updated = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - updated[:, None])
        shrink = tl.exp2(largest - updated)
        total = total * shrink + tl.sum(p, 1)
        if dropout_seed_ptr is not None:
            keep = _philox.keep_mask(
                dropout_seed_ptr,
                dropout_threshold,
                dropout_offset,
                head,
                first.to(tl.int32) + queries,
                start,
                BLOCK_N,
            )
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = updated

    out = acc * (keep_scale / total)[:, None]
    out_row = out_ptr + first * stride_part + head * HEAD_DIM
    _store_tile(out_row, out, queries, length, stride_part, HEAD_DIM, BLOCK_D)
    lse = (largest + tl.log2(total)) * 0.6931471805599453  # log(2)
    lse_row = lse_ptr + head.to(tl.int64) * num_tokens + first
    tl.store(lse_row + queries, lse, mask=queries < length)


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
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
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
    first, length, tile = _find_tile(cu_seqlens_ptr, tiles_per_sequence)
    if tile * BLOCK_M >= length:
        return
    head = tl.program_id(1)
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    k_ptr = qkv_ptr + head_offset + stride_part
    v_ptr = k_ptr + stride_part
    out_offset = first * stride_part + head * HEAD_DIM
    statistics_offset = head.to(tl.int64) * num_tokens + first

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_tile(qkv_ptr + head_offset, queries, length, stride_token, HEAD_DIM, BLOCK_D)
    dout = _load_tile(dout_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D)
    out = _load_tile(out_ptr + out_offset, queries, length, stride_part, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics_offset + queries, delta, mask=queries < length)
    lse = tl.load(lse_ptr + statistics_offset + queries, mask=queries < length, other=0.0)
    lse *= 1.4426950408889634  # log2(e)
    score_scale = softmax_scale * 1.4426950408889634

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        v = _load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        p = tl.where((keys < length)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if dropout_seed_ptr is not None:
            keep = _philox.keep_mask(
                dropout_seed_ptr,
                dropout_threshold,
                dropout_offset,
                head,
                first.to(tl.int32) + queries,
                start,
                BLOCK_N,
            )
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr = dqkv_ptr + head_offset
    _store_tile(dq_ptr, dq * softmax_scale, queries, length, stride_token, HEAD_DIM, BLOCK_D)


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
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
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
    over queries. BLOCK_M: queries a step.  BLOCK_N: keys of the program.  tiles_per_sequence: key
    tiles for the longest sequence.  All else as in the dQ kernel, which has written delta.
    """
    first, length, tile = _find_tile(cu_seqlens_ptr, tiles_per_sequence)
    if tile * BLOCK_N >= length:
        return
    head = tl.program_id(1)
    stride_part = num_heads * HEAD_DIM
    stride_token = 3 * stride_part
    head_offset = first * stride_token + head * HEAD_DIM
    q_ptr = qkv_ptr + head_offset
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    dout_head_ptr = dout_ptr + first * stride_part + head * HEAD_DIM
    statistics_offset = head.to(tl.int64) * num_tokens + first
    score_scale = softmax_scale * 1.4426950408889634  # log2(e)

    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_tile(k_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    v = _load_tile(v_ptr, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q = _load_tile(q_ptr, queries, length, stride_token, HEAD_DIM, BLOCK_D)
        dout = _load_tile(dout_head_ptr, queries, length, stride_part, HEAD_DIM, BLOCK_D)
        # An infinite lse makes the probabilities of queries past the end exactly 0.
        mask = queries < length
        lse = tl.load(lse_ptr + statistics_offset + queries, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + statistics_offset + queries, mask=mask, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale
        p = tl.exp2(s - (lse * 1.4426950408889634)[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dropped_p = p
        if dropout_seed_ptr is not None:
            keep = tl.trans(
                _philox.keep_mask(
                    dropout_seed_ptr,
                    dropout_threshold,
                    dropout_offset,
                    head,
                    first.to(tl.int32) + queries,
                    tile * BLOCK_N,
                    BLOCK_N,
                )
            )
            dropped_p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped_p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptr = dqkv_ptr + head_offset + stride_part
    _store_tile(dk_ptr, dk * softmax_scale, keys, length, stride_token, HEAD_DIM, BLOCK_D)
    dv_ptr = dk_ptr + stride_part
    _store_tile(dv_ptr, dv * keep_scale, keys, length, stride_token, HEAD_DIM, BLOCK_D)


def attention_fwd(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_i = sum_j dropout(p_ij) v_j, p_ij = exp(s_ij - lse_i), s_ij = softmax_scale q_i . k_j.

    qkv: (T, 3, N, D) contiguous fp32, bf16 or fp16, D <= 256.  cu_seqlens: int32 (B + 1,) on the
    device.  max_seqlen: host int, at least the longest length.  softmax_scale, dropout_p: floats.
    dropout_seed: int64 (1,) on the device, or None.  dropout_offset: the site.
    Returns out (T, N, D) in qkv.dtype and lse (N, T) fp32. Sums are in fp32; probabilities are
    rounded to qkv.dtype before they meet V.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=qkv.device)
    if qkv.numel() == 0:
        return out, lse
    tile = _tiles(qkv, dropout_p).fwd
    tiles_per_sequence = triton.cdiv(max_seqlen, tile.block_m)
    with torch.cuda.device_of(qkv):
        _attention_fwd_kernel[_grid(tiles_per_sequence, cu_seqlens, num_heads)](
            qkv,
            out,
            lse,
            cu_seqlens,
            *_philox.dropout_args(dropout_p, dropout_seed, dropout_offset),
            softmax_scale * LOG2_E,
            num_tokens,
            num_heads,
            tiles_per_sequence,
            **_tile_args(head_dim, tile),
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
) -> torch.Tensor:
    """delta_i = dout_i . out_i; dp = dropout'(dout v^T); ds = p (dp - delta); dq = scale ds k;
    dk = scale ds^T q; dv = dropout(p)^T dout.

    dout, out: (T, N, D) contiguous.  lse: (N, T) fp32.  All else as in forward.
    Returns dqkv (T, 3, N, D) in qkv.dtype.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return dqkv
    dq_tile, dkdv_tile = _tiles(qkv, dropout_p)[1:]
    delta = torch.empty_like(lse)
    dropout = _philox.dropout_args(dropout_p, dropout_seed, dropout_offset)
    with torch.cuda.device_of(qkv):
        tiles_per_sequence = triton.cdiv(max_seqlen, dq_tile.block_m)
        _attention_bwd_dq_kernel[_grid(tiles_per_sequence, cu_seqlens, num_heads)](
            dout,
            qkv,
            out,
            lse,
            delta,
            dqkv,
            cu_seqlens,
            *dropout,
            softmax_scale,
            num_tokens,
            num_heads,
            tiles_per_sequence,
            **_tile_args(head_dim, dq_tile),
        )
        tiles_per_sequence = triton.cdiv(max_seqlen, dkdv_tile.block_n)
        _attention_bwd_dkdv_kernel[_grid(tiles_per_sequence, cu_seqlens, num_heads)](
            dout,
            qkv,
            lse,
            delta,
            dqkv,
            cu_seqlens,
            *dropout,
            softmax_scale,
            num_tokens,
            num_heads,
            tiles_per_sequence,
            **_tile_args(head_dim, dkdv_tile),
        )
    return dqkv


def _tiles(qkv: torch.Tensor, dropout_p: float) -> _config.AttentionTiles:
    arch = _config.capability(qkv)
    return _config.attention(qkv.shape[3], qkv.element_size(), dropout_p > 0.0, arch)


def _grid(tiles_per_sequence: int, cu_seqlens: torch.Tensor, num_heads: int) -> tuple[int, int]:
    return tiles_per_sequence * (cu_seqlens.shape[0] - 1), num_heads


def _tile_args(head_dim: int, tile: _config.AttentionTile) -> dict[str, int]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
