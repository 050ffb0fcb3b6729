"""embed_layer_norm: three gathers, their sum, LayerNorm and dropout: a BERT's first layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import differentiable
from fastbert.ops._registry import OPS

_OP = OPS["embed_layer_norm"]


def embed_layer_norm(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    dropout_offset: int = 0,
) -> torch.Tensor:
    """y = dropout(LN(word[input_ids] + position[position_ids] + token_type[token_type_ids]))
    (Devlin et al., arXiv 1810.04805, figure 2).

    *_ids: (T,) int64.  word (V, H), position (P, H), token_type (K, H): one floating dtype, which y
    (T, H) takes; token_type and its ids are both None or both there.  weight, bias: (H,), that
    dtype or fp32.  Rows ``padding_idx`` of word and ``position_padding_idx`` of position get zero
    gradient, as in ``nn.Embedding``. Table gradients are dense and summed in one fixed order.
    dropout: as in add_layer_norm, but after the LayerNorm.
    Raises ValueError for bad shapes, dtypes, dropout_p and, on CPU, an id out of its table; on a
    GPU ids are never used out of bounds but not reported either.
    """
    _check.activation("word", word, ("V", "H"))
    hidden = word.shape[1]
    tokens = input_ids.shape[0] if isinstance(input_ids, torch.Tensor) and input_ids.dim() else 0
    _check.ids("input_ids", input_ids, "T", word.device)
    _check.ids("position_ids", position_ids, tokens, word.device)
    _check.activation("position", position, ("P", hidden))
    if (token_type is None) != (token_type_ids is None):
        raise ValueError("token_type_ids: expected together with token_type, or neither")
    if token_type is not None and token_type_ids is not None:
        _check.ids("token_type_ids", token_type_ids, tokens, word.device)
        _check.like("token_type", token_type, word, (token_type.shape[0], hidden))
    _check.like("position", position, word, (position.shape[0], hidden))
    _check.vector("weight", weight, word, hidden)
    _check.vector("bias", bias, word, hidden)
    _check.dropout(dropout_p, dropout_seed, word)
    return _embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        eps, -1 if padding_idx is None else padding_idx,
        -1 if position_padding_idx is None else position_padding_idx,
        dropout_p, dropout_seed, dropout_offset,
    )[0]  # fmt: skip


def embed_reference(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
) -> torch.Tensor:
    """e = word[input_ids] + position[position_ids] + token_type[token_type_ids]"""
    e = F.embedding(input_ids, word) + F.embedding(position_ids, position)
    if token_type_ids is None or token_type is None:
        return e
    return e + F.embedding(token_type_ids, token_type)


def _forward(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _OP.launcher("fwd", word, word.shape[1])(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        eps, dropout_p, dropout_seed, dropout_offset,
    )  # fmt: skip


def _fake(input_ids: torch.Tensor, _p: Any, _t: Any, word: torch.Tensor, *ignored: Any) -> Any:
    y = word.new_empty(input_ids.shape[0], word.shape[1])
    statistic = torch.float64 if word.dtype == torch.float64 else torch.float32
    mean = y.new_empty(y.shape[0], dtype=statistic)
    return y, mean, torch.empty_like(mean)


def _backward(
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
    padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dword, dposition, dtoken_type, dweight, dbias = _OP.launcher("bwd", word, word.shape[1])(
        dy.contiguous(), input_ids, position_ids, token_type_ids, word, position, token_type,
        weight, mean, rstd, dropout_p, dropout_seed, dropout_offset,
    )  # fmt: skip
    if padding_idx >= 0:
        dword[padding_idx].zero_()
    if position_padding_idx >= 0:
        dposition[position_padding_idx].zero_()
    dtoken_type = word.new_empty(0) if dtoken_type is None else dtoken_type
    return dword, dposition, dtoken_type, dweight, dbias


def _backward_fake(
    dy: Any,
    _ids: Any,
    _positions: Any,
    _types: Any,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    *ignored: Any,
) -> Any:
    return (
        torch.empty_like(word),
        torch.empty_like(position),
        word.new_empty(0) if token_type is None else torch.empty_like(token_type),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, _bias, _eps, word_pad, position_pad, ctx.dropout_p, seed, ctx.dropout_offset = inputs
    ctx.padding = (word_pad, position_pad)
    ctx.save_for_backward(*tensors, *output[1:], seed)


def _gradients(ctx: Any, backward: Any, dy: torch.Tensor, *ignored: Any) -> Any:
    *tensors, seed = ctx.saved_tensors
    dword, dposition, dtoken_type, dweight, dbias = backward(
        dy, *tensors, *ctx.padding, ctx.dropout_p, seed, ctx.dropout_offset
    )
    has_types = tensors[5] is not None
    tables = (dword, dposition, dtoken_type if has_types else None)
    return None, None, None, *tables, dweight, dbias, *(None,) * 6


_IDS = "Tensor input_ids, Tensor position_ids, Tensor? token_type_ids"
_TABLES = "Tensor word, Tensor position, Tensor? token_type, Tensor weight"
_TAIL = (
    "int padding_idx, int position_padding_idx, "
    "float dropout_p, Tensor? dropout_seed, int dropout_offset"
)
_embed_layer_norm = differentiable(
    "embed_layer_norm",
    schema=f"({_IDS}, {_TABLES}, Tensor bias, float eps, {_TAIL}) -> (Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    backward_schema=f"(Tensor dy, {_IDS}, {_TABLES}, Tensor mean, Tensor rstd, {_TAIL}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)
