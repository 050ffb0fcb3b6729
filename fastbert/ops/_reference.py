"""The reference backend: launchers made from each op's plain-torch reference.

Forward is the reference; backward is the textbook formula, which holds also where autograd is off
(inside an operator of torch.library). Slow, runs everywhere, and is what every kernel is held to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check, philox
from fastbert.ops._matmul import mm
from fastbert.ops.add_layer_norm import add_residual_reference, layer_norm_reference
from fastbert.ops.attention import (
    add_bias,
    attention_reference,
    drop_probabilities,
    probabilities,
)
from fastbert.ops.bias_gelu import bias_gelu_reference
from fastbert.ops.embed_layer_norm import embed_reference
from fastbert.ops.linear_fp8 import linear_fp8_reference, quantize_rows_fp8_reference
from fastbert.ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from fastbert.ops.rows import gather_rows_reference, scatter_rows_reference

Tensor = torch.Tensor


def attention_fwd(qkv: Tensor, cu: Tensor, max_seqlen: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return attention_reference(qkv, cu, max_seqlen, *rest)[:2]


def attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    softmax_scale: float, dropout_p: float, seed: Tensor | None, offset: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """p = exp(s - lse), ds = p (drop(dout v^T) - delta), delta = sum_d dout out; then
    dq = scale ds k, dk = scale ds^T q, dv = drop(p)^T dout."""
    dqkv = torch.empty_like(qkv)
    delta = (_wide(dout) * _wide(out)).sum(2).t()
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        # The very numbers that lse is of.
        scores = add_bias(_wide(q @ k.transpose(1, 2)) * softmax_scale, bias, start)
        p = probabilities(scores, lse[:, start:end])
        q, k, v, grad = _wide(q), _wide(k), _wide(v), _wide(dout[start:end]).transpose(0, 1)
        factor = drop_probabilities(torch.ones_like(p), start, dropout_p, seed, offset)
        ds = p * (grad @ v.transpose(1, 2) * factor - delta[:, start:end, None]) * softmax_scale
        parts = ds @ k, ds.transpose(1, 2) @ q, (p * factor).transpose(1, 2) @ grad
        dqkv[start:end] = torch.stack(parts).permute(2, 0, 1, 3)
    return dqkv


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return bias_gelu_reference(x, bias, tanh)


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor | None]:
    u = x if bias is None else x + bias.to(x.dtype)
    dx = torch.ops.aten.gelu_backward(dy, u, approximate="tanh" if tanh else "none")
    return dx, None if bias is None else _wide(dx).sum(0).to(bias.dtype)


def feed_forward_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, tanh: bool, save: bool
) -> tuple[Tensor, Tensor | None]:
    pre = mm(x, w1.t())
    return bias_gelu_reference(pre, b1, tanh), pre if save else None


def feed_forward_bwd(
    dy: Tensor, w2: Tensor, pre: Tensor, b1: Tensor | None, tanh: bool, need_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dpre, db1 = bias_gelu_bwd(mm(dy, w2), pre, b1, tanh)
    return dpre, db1, bias_gelu_reference(pre, b1, tanh) if need_y else None


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(variance + eps) of each row, in fp32 (fp64 for fp64)."""
    z = _wide(z)
    mean = z.mean(1)
    variance = (z - mean[:, None]).square().mean(1)
    return mean, (variance + eps).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _layer_norm_bwd(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dz = rstd (g - E g - n E(g n)) with n = (z - mean) rstd and g = dy weight; dweight; dbias."""
    dy = _wide(dy)
    n = (_wide(z) - mean[:, None]) * rstd[:, None]
    g = dy * _wide(weight)
    dz = rstd[:, None] * (g - g.mean(1, keepdim=True) - n * (g * n).mean(1, keepdim=True))
    return dz.to(z.dtype), (dy * n).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dropout_p: float, seed: Tensor | None, offset: int, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    z = add_residual_reference(x, residual, x_bias, dropout_p, seed, offset)
    y = layer_norm_reference(z, weight, bias, eps)
    return (y, z, *_statistics(z, eps)) if save else (y, None, None, None)


def add_layer_norm_bwd(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, offset: int, need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    dz, dweight, dbias = _layer_norm_bwd(dy, z, weight, mean, rstd)
    dx = philox.dropout(dz, dropout_p, seed, offset)
    return dz, dx, dweight, dbias, _wide(dx).sum(0).to(weight.dtype) if need_x_bias else None


def embed_layer_norm_fwd(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, word: Tensor,
    position: Tensor, token_type: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dropout_p: float, seed: Tensor | None, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check.in_range("input_ids", input_ids, word.shape[0])
    _check.in_range("position_ids", position_ids, position.shape[0])
    if token_type_ids is not None and token_type is not None:
        _check.in_range("token_type_ids", token_type_ids, token_type.shape[0])
    e = embed_reference(input_ids, position_ids, token_type_ids, word, position, token_type)
    y = layer_norm_reference(e, weight, bias, eps)
    return philox.dropout(y, dropout_p, seed, offset), *_statistics(e, eps)


def embed_layer_norm_bwd(
    dy: Tensor, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor | None, weight: Tensor,
    mean: Tensor, rstd: Tensor, dropout_p: float, seed: Tensor | None, offset: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    e = embed_reference(input_ids, position_ids, token_type_ids, word, position, token_type)
    dy = philox.dropout(dy, dropout_p, seed, offset)
    de, dweight, dbias = _layer_norm_bwd(dy, e, weight, mean, rstd)

    def table(rows: Tensor, like: Tensor) -> Tensor:
        total = torch.zeros_like(_wide(like))
        return total.index_add_(0, rows, _wide(de)).to(like.dtype)

    dtoken_type = None
    if token_type_ids is not None and token_type is not None:
        dtoken_type = table(token_type_ids, token_type)
    return table(input_ids, word), table(position_ids, position), dtoken_type, dweight, dbias


def cross_entropy_rows(
    logits: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, scale: Tensor | None
) -> Tensor:
    _check.in_range("labels", labels, logits.shape[1], ignore_index)
    u = _wide(logits) if bias is None else _wide(logits) + _wide(bias)
    loss = F.cross_entropy(u, labels, ignore_index=ignore_index, reduction="none")
    if scale is not None:
        kept = labels != ignore_index
        onehot = F.one_hot(torch.where(kept, labels, 0), u.shape[1])
        # where, not a product: the scale of a batch without a label that counts is infinite.
        logits.copy_(torch.where(kept[:, None], (u.softmax(1) - onehot) * scale, 0.0))
    return loss


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    _check.ascending("index", index, x.shape[0])
    return gather_rows_reference(x, index)


def scatter_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    _check.ascending("index", index, num_rows)
    return scatter_rows_reference(x, index, num_rows)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows_reference(x)


def linear_int8(*inputs: Any) -> Tensor:
    return linear_int8_reference(*inputs)


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_fp8_reference(x)


def linear_fp8(*inputs: Any) -> Tensor:
    return linear_fp8_reference(*inputs)


def add_layer_norm_int8(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor,
    multiplier: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z = add_residual_reference(x, residual, x_bias, 0.0, None, 0)
    y = layer_norm_reference(z, weight, bias, eps)
    return y, *quantize_rows_reference(y if multiplier is None else y.float() * multiplier)
