"""What the kernels must compute, in fp64, and the Philox masks: nothing here is fastbert's code."""

from __future__ import annotations

import math

import numpy as np
import torch

Tensor = torch.Tensor


def philox_words(
    seed: int, offset: int, plane: np.ndarray, row: np.ndarray, col: np.ndarray
) -> np.ndarray:
    """uint32 words of Philox4x32-10 (Salmon et al. 2011) at broadcast positions.

    key = (seed low, high), counter = (col // 4, row, offset, plane), word col % 4.
    """
    plane, row, col = np.broadcast_arrays(plane, row, col)
    mask = np.uint64(0xFFFFFFFF)
    counter = [
        np.asarray(c, dtype=np.uint64) for c in (col // 4, row, np.full_like(col, offset), plane)
    ]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first = counter[0] * np.uint64(0xD2511F53)
        third = counter[2] * np.uint64(0xCD9E8D57)
        high = np.uint64(32)
        counter = [
            (third >> high) ^ counter[1] ^ np.uint64(key[0]),
            third & mask,
            (first >> high) ^ counter[3] ^ np.uint64(key[1]),
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.choose(col % 4, counter).astype(np.uint32)


def keep_mask(
    p: float, seed: int, offset: int, plane: np.ndarray | int, row: np.ndarray, col: np.ndarray
) -> Tensor:
    """1 / (1 - p) where kept, else 0, in fp64."""
    words = philox_words(seed, offset, np.asarray(plane), row, col)
    keep = words >= np.uint32(math.floor(p * 2.0**32))
    return torch.from_numpy(keep).double() / (1.0 - p)


def hidden_mask(p: float, seed: int, offset: int, rows: int, cols: int) -> Tensor:
    return keep_mask(p, seed, offset, 0, np.arange(rows)[:, None], np.arange(cols)[None, :])


def attention(
    qkv: Tensor, cu_seqlens: list[int], scale: float, p: float, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """out (T, N, D) and lse (N, T) from qkv (T, 3, N, D)."""
    qkv = qkv.double().cpu()
    tokens, _, heads, dim = qkv.shape
    out, lse = torch.zeros(tokens, heads, dim).double(), torch.zeros(heads, tokens).double()
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if start == end:
            continue
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        scores = scale * q @ k.transpose(1, 2)
        lse[:, start:end] = scores.logsumexp(-1)
        probabilities = scores.softmax(-1)
        if p > 0.0:
            head = np.arange(heads)[:, None, None]
            row = np.arange(start, end)[None, :, None]
            col = np.arange(end - start)[None, None, :]
            probabilities = probabilities * keep_mask(p, seed, offset, head, row, col)
        out[start:end] = (probabilities @ v).transpose(0, 1)
    return out, lse


def attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, cu_seqlens: list[int], scale: float, p: float,
    seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """dqkv (T, 3, N, D) by autograd, but that delta_i = dout_i . out_i comes from the given out: a
    kernel is handed the rounded one. Another delta changes ds_ij by p_ij times the difference."""
    exact = qkv.double().cpu().requires_grad_()
    dout, out = dout.double().cpu(), out.double().cpu()
    want = attention(exact, cu_seqlens, scale, p, seed, offset)[0]
    if not want.requires_grad:  # no token
        return torch.zeros_like(exact)
    (dqkv,) = torch.autograd.grad(want, exact, dout)
    difference = (dout * (out - want.detach())).sum(-1).T  # (N, T)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        q, k, _ = exact.detach()[start:end].permute(1, 2, 0, 3)
        ds = (scale * q @ k.transpose(1, 2)).softmax(-1) * -difference[:, start:end, None]
        dqkv[start:end, 0] += scale * (ds @ k).transpose(0, 1)
        dqkv[start:end, 1] += scale * (ds.transpose(1, 2) @ q).transpose(0, 1)
    return dqkv


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    u = x if bias is None else x + bias
    if tanh:
        return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))


def residual_sum(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, p: float, seed: int, offset: int
) -> Tensor:
    """z = residual + dropout(x + x_bias)"""
    z = x if x_bias is None else x + x_bias
    if p > 0.0:
        z = z * hidden_mask(p, seed, offset, *x.shape)
    return z if residual is None else z + residual


def layer_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1/std of each row."""
    mean = z.mean(1, keepdim=True)
    rstd = ((z - mean) ** 2).mean(1, keepdim=True).add(eps).rsqrt()
    return (z - mean) * rstd * weight + bias, mean[:, 0], rstd[:, 0]


def layer_norm_bwd(
    dy: Tensor, z: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dweight, dbias by autograd."""
    z, weight = z.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.zeros_like(weight, requires_grad=True)
    y = layer_norm(z, weight, bias, eps)[0]
    dz, dweight, dbias = torch.autograd.grad(y, (z, weight, bias), dy)
    return dz, dweight, dbias


def embed_layer_norm(
    ids: tuple[Tensor, Tensor, Tensor | None], tables: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor, bias: Tensor, eps: float, mask: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean and 1/std of each token; ``mask`` multiplies y. Ids read the nearest row there is,
    those outside their table give it no gradient."""
    e: Tensor | float = 0.0
    for i, table in zip(ids, tables, strict=True):
        if i is not None and table is not None:
            inside = ((i >= 0) & (i < len(table)))[:, None]
            row = table[i.clamp(0, len(table) - 1)]
            e = e + torch.where(inside, row, row.detach())
    y, mean, rstd = layer_norm(torch.as_tensor(e), weight, bias, eps)
    return y * mask, mean, rstd
