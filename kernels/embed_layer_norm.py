"""embed_layer_norm: y = dropout(LayerNorm(word[id] + position[p] + token_type[t]))."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import _config, _layer_norm, _philox, _reduce, _table_gradient


@triton.jit
def _table_rows(ids_ptr, table_ptr, num_entries, tokens, in_tokens, cols, in_width, width):
    """table[ids[token]] as an fp32 block, 0 outside the mask; ids are clamped into the table.

    ids_ptr: int64 (T,).  table_ptr: (num_entries, width).  tokens, in_tokens: (BLOCK_M,) indices
    and mask.  cols, in_width: (BLOCK_H,) indices and mask.  width: row width.
    """
    ids = tl.load(ids_ptr + tokens, mask=in_tokens, other=0)
    ids = tl.minimum(tl.maximum(ids, 0), num_entries - 1)
    mask = in_tokens[:, None] & in_width[None, :]
    rows = tl.load(table_ptr + ids[:, None] * width + cols[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def _embed(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    num_words,
    num_positions,
    num_token_types,
    tokens,
    in_tokens,
    cols,
    in_width,
    width,
):
    """e = word[id] + position[p] + token_type[t], fp32; arguments as in the kernels below."""
    e = _table_rows(input_ids_ptr, word_ptr, num_words, tokens, in_tokens, cols, in_width, width)
    e += _table_rows(
        position_ids_ptr, position_ptr, num_positions, tokens, in_tokens, cols, in_width, width
    )
    if token_type_ids_ptr is not None:
        e += _table_rows(
            token_type_ids_ptr,
            token_type_ptr,
            num_token_types,
            tokens,
            in_tokens,
            cols,
            in_width,
            width,
        )
    return e


@triton.jit(do_not_specialize=["num_tokens", "dropout_threshold", "dropout_offset"])
def _embed_layer_norm_fwd_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    num_words,
    num_positions,
    num_token_types,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    num_tokens,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y = dropout((e - mean) rstd weight + bias), e the sum of three rows; a row block a program.

    input_ids_ptr, position_ids_ptr, token_type_ids_ptr (or None): int64 (num_tokens,).
    word_ptr, position_ptr, token_type_ptr (or None): tables (num_words | num_positions |
    num_token_types, width).  weight_ptr, bias_ptr: (width,).  y_ptr: (num_tokens, width).
    mean_ptr, rstd_ptr: fp32 (num_tokens,).  dropout_seed_ptr: int64 seed, None without dropout.
    dropout_threshold, dropout_offset, keep_scale: see ``_philox.Dropout``.  eps: added to the
    variance.  BLOCK_M: tokens.  BLOCK_H: width padded to a power of two.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_H)
    in_tokens = tokens < num_tokens
    in_width = cols < width
    e = _embed(
        input_ids_ptr,
        position_ids_ptr,
        token_type_ids_ptr,
        word_ptr,
        position_ptr,
        token_type_ptr,
        num_words,
        num_positions,
        num_token_types,
        tokens,
        in_tokens,
        cols,
        in_width,
        width,
    )
    mean, rstd = _layer_norm.row_statistics(e, in_width, width, eps)
    tl.store(mean_ptr + tokens, mean, mask=in_tokens)
    tl.store(rstd_ptr + tokens, rstd, mask=in_tokens)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    y = (e - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    if dropout_seed_ptr is not None:
        keep = _philox.keep_mask(
            dropout_seed_ptr, dropout_threshold, dropout_offset, 0, tokens, 0, BLOCK_H
        )
        y = tl.where(keep, y * keep_scale, 0.0)
    offsets = tokens.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(y_ptr + offsets, y, mask=in_tokens[:, None] & in_width[None, :])


@triton.jit(do_not_specialize=["num_tokens", "dropout_threshold", "dropout_offset"])
def _embed_layer_norm_bwd_kernel(
    dy_ptr,
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    num_words,
    num_positions,
    num_token_types,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    de_ptr,
    partial_ptr,
    dropout_seed_ptr,
    dropout_threshold,
    dropout_offset,
    keep_scale,
    num_tokens,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """de, the gradient of the summed embeddings, and one row group's shares of dweight and dbias.

    Program g takes row blocks g, g + G, …, G = number of programs. dy_ptr, de_ptr: (num_tokens,
    width).  partial_ptr: fp32 (2, G, width), dweight then dbias.  All else as in forward.
    """
    cols = tl.arange(0, BLOCK_H)
    in_width = cols < width
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.num_programs(0)):
        tokens = block * BLOCK_M + tl.arange(0, BLOCK_M)
        in_tokens = tokens < num_tokens
        mask = in_tokens[:, None] & in_width[None, :]
        offsets = tokens.to(tl.int64)[:, None] * width + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        e = _embed(
            input_ids_ptr,
            position_ids_ptr,
            token_type_ids_ptr,
            word_ptr,
            position_ptr,
            token_type_ptr,
            num_words,
            num_positions,
            num_token_types,
            tokens,
            in_tokens,
            cols,
            in_width,
            width,
        )
        mean = tl.load(mean_ptr + tokens, mask=in_tokens, other=0.0)
        rstd = tl.load(rstd_ptr + tokens, mask=in_tokens, other=0.0)
        if dropout_seed_ptr is not None:
            keep = _philox.keep_mask(
                dropout_seed_ptr, dropout_threshold, dropout_offset, 0, tokens, 0, BLOCK_H
            )
            dy = tl.where(keep, dy * keep_scale, 0.0)
        normalized = _layer_norm.normalize(e, mean, rstd, in_width)
        dweight += dy * normalized
        dbias += dy
        de = _layer_norm.input_gradient(dy, normalized, weight, rstd, width)
        tl.store(de_ptr + offsets, de, mask=mask)
    group = partial_ptr + tl.program_id(0) * width + cols
    tl.store(group, tl.sum(dweight, 0), mask=in_width)
    tl.store(group + tl.num_programs(0) * width, tl.sum(dbias, 0), mask=in_width)


def embed_layer_norm_fwd(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = dropout((e - mean) rstd weight + bias), e = word[id] + position[p] + token_type[t].

    input_ids, position_ids, token_type_ids: (T,) int64; the last may be None.  word (V, H),
    position (P, H), token_type (K, H): contiguous fp32, bf16 or fp16; y takes word's dtype.
    weight, bias: (H,).  eps, dropout_p: floats.  dropout_seed: int64 (1,) on the device, or None.
    dropout_offset: the site.
    Returns y (T, H), mean (T,), rstd (T,) fp32. An id out of range reads the table's nearest row.
    """
    num_tokens, width = input_ids.shape[0], word.shape[1]
    y = torch.empty(num_tokens, width, dtype=word.dtype, device=word.device)
    mean = torch.empty(num_tokens, dtype=torch.float32, device=word.device)
    rstd = torch.empty_like(mean)
    if num_tokens == 0:
        return y, mean, rstd
    block_m, block_h, num_warps = _config.layer_norm_fwd(width)
    with torch.cuda.device_of(word):
        _embed_layer_norm_fwd_kernel[(triton.cdiv(num_tokens, block_m),)](
            *_lookup(input_ids, position_ids, token_type_ids, word, position, token_type),
            weight,
            bias,
            y,
            mean,
            rstd,
            *_philox.dropout_args(dropout_p, dropout_seed, dropout_offset),
            num_tokens,
            width,
            eps,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
    return y, mean, rstd


def embed_layer_norm_bwd(
    dy: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of word, position, token_type (None without one), weight and bias.

    dy: (T, H) contiguous in word.dtype.  mean, rstd: as forward returned them.  All else as in
    forward. Each gradient has its parameter's shape and dtype; table rows that no token names are
    exactly 0, and an id out of range adds nothing. The per-token gradient is rounded to dy.dtype
    once; sums are in fp32 and in a fixed order.
    """
    num_tokens, width = dy.shape
    if num_tokens == 0:
        dtoken_type = None if token_type is None else torch.zeros_like(token_type)
        zeros = [torch.zeros_like(p) for p in (word, position, weight, weight)]
        return zeros[0], zeros[1], dtoken_type, zeros[2], zeros[3]
    block_m, block_h, num_warps = _config.layer_norm_bwd(width, dy.element_size())
    groups = _config.row_groups(triton.cdiv(num_tokens, block_m), 1, _config.capability(dy))
    partial = torch.empty(2, groups, width, dtype=torch.float32, device=dy.device)
    de = torch.empty_like(dy)
    with torch.cuda.device_of(dy):
        _embed_layer_norm_bwd_kernel[(groups,)](
            dy,
            *_lookup(input_ids, position_ids, token_type_ids, word, position, token_type),
            weight,
            mean,
            rstd,
            de,
            partial,
            *_philox.dropout_args(dropout_p, dropout_seed, dropout_offset),
            num_tokens,
            width,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )
        dweight, dbias = _reduce.sum_partials(partial, weight.dtype)
        dword = _table_gradient.sum_runs(de, input_ids, word)
        dposition = _table_gradient.sum_runs(de, position_ids, position)
        dtoken_type = None
        if token_type_ids is not None and token_type is not None:
            dtoken_type = _table_gradient.sum_runs(de, token_type_ids, token_type)
    return dword, dposition, dtoken_type, dweight, dbias


def _lookup(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
) -> tuple[torch.Tensor | int | None, ...]:
    """The first nine arguments of both kernels: ids, tables, numbers of table rows."""
    num_token_types = 0 if token_type is None else token_type.shape[0]
    return (
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        word.shape[0],
        position.shape[0],
        num_token_types,
    )
