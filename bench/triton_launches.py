"""The launches that ``bench/triton_resources.py`` compiles: BERT-base unless the name says more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

TOKENS, MASKED, VOCABULARY = 8192, 1229, 30522


def _attention_call(
    dtype: Any, head_dim: int, p: float, bias: bool, longest: int, mask: bool
) -> tuple[Any, tuple[Any, ...]]:
    """qkv and the arguments that follow the tensors in both halves."""
    import torch

    from fastbert.kernels import _attention_dropout

    qkv = torch.empty(TOKENS, 3, 768 // head_dim, head_dim, dtype=dtype)
    cu_seqlens = torch.zeros(17, dtype=torch.int32)
    seed = torch.zeros(1, dtype=torch.int64)
    scores = torch.empty(1, TOKENS, 512) if bias else None
    bits = None
    if mask:
        bits = _attention_dropout.dropout_mask(
            cu_seqlens, longest, TOKENS, qkv.shape[2], p, seed, 0
        )
    return qkv, (cu_seqlens, longest, head_dim**-0.5, p, seed, 0, scores, bits)


def _attention(
    dtype: Any,
    head_dim: int,
    p: float,
    bias: bool = False,
    mask: bool = False,
    longest_first: bool = False,
) -> None:
    from fastbert.kernels import attention

    if (mask or longest_first) and dtype.itemsize != 2:
        return  # _attention_dropout.chosen_mask and _attention_config.longest_first take none
    qkv, site = _attention_call(dtype, head_dim, p, bias, 512, mask)
    out, lse = attention.forward(qkv, *site, longest_first)
    attention.BACKWARDS["two_kernels"](out, qkv, out, lse, *site, longest_first)


def _attention_bwd(
    dtype: Any,
    way: str,
    head_dim: int,
    p: float,
    bias: bool = False,
    mask: bool = False,
) -> None:
    """One of the backwards in one kernel, where it has a tile."""
    import torch

    from fastbert.kernels import _attention_config, _config, attention

    choose = getattr(_attention_config, f"bwd_{way}")
    arch = _config.capability(torch.empty(0))
    tile = choose(head_dim, dtype.itemsize, p > 0.0, arch, bias)
    if tile is not None:
        longest = tile.block_m if way == "short" else 512
        qkv, site = _attention_call(dtype, head_dim, p, bias, longest, mask)
        out = torch.empty_like(qkv[:, 0])
        lse = torch.empty(qkv.shape[2], TOKENS)
        attention.BACKWARDS[way](out, qkv, out, lse, *site)


def _bias_gelu(dtype: Any, tanh: bool) -> None:
    import torch

    from fastbert.kernels import bias_gelu

    x, bias = torch.empty(TOKENS, 3072, dtype=dtype), torch.empty(3072, dtype=dtype)
    bias_gelu.bias_gelu_fwd(x, bias, tanh)
    bias_gelu.bias_gelu_bwd(x, x, bias, tanh)


def _feed_forward(dtype: Any, tanh: bool) -> None:
    import torch

    from fastbert.kernels import feed_forward

    if dtype.itemsize != 2:
        return
    x, w1 = torch.empty(TOKENS, 768, dtype=dtype), torch.empty(3072, 768, dtype=dtype)
    b1, w2 = torch.empty(3072, dtype=dtype), torch.empty(768, 3072, dtype=dtype)
    for wanted in (True, False):
        y, _ = feed_forward.feed_forward_fwd(x, w1, b1, tanh, wanted)
        feed_forward.feed_forward_bwd(x, w2, y, b1, tanh, wanted)


def _add_layer_norm(dtype: Any, width: int, p: float) -> None:
    import torch

    from fastbert.kernels import add_layer_norm

    x, vector = torch.empty(TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype)
    dropout = (p, torch.zeros(1, dtype=torch.int64), 0)
    y, z, mean, rstd = add_layer_norm.add_layer_norm_fwd(
        x, x, vector, vector, vector, 1e-12, *dropout, True
    )
    add_layer_norm.add_layer_norm_bwd(y, z, vector, mean, rstd, *dropout, True)


def _embed_layer_norm(dtype: Any, width: int, p: float) -> None:
    import torch

    from fastbert.kernels import embed_layer_norm

    ids = torch.zeros(TOKENS, dtype=torch.int64)
    tables = [torch.empty(rows, width, dtype=dtype) for rows in (VOCABULARY, 512, 2)]
    vector = torch.empty(width, dtype=dtype)
    dropout = (p, torch.zeros(1, dtype=torch.int64), 0)
    y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
        ids, ids, ids, *tables, vector, vector, 1e-12, *dropout
    )
    embed_layer_norm.embed_layer_norm_bwd(y, ids, ids, ids, *tables, vector, mean, rstd, *dropout)


def _cross_entropy_rows(dtype: Any) -> None:
    import torch

    from fastbert.kernels import cross_entropy

    # Rows padded to a multiple of 16 bytes, as the decoder GEMM writes them.
    logits = torch.empty(MASKED, VOCABULARY + 6, dtype=dtype)[:, :VOCABULARY]
    bias, labels = torch.empty(VOCABULARY, dtype=dtype), torch.zeros(MASKED, dtype=torch.int64)
    for grad_scale in (None, torch.ones(1)):
        cross_entropy.cross_entropy_rows(logits, bias, labels, -100, grad_scale)


def _rows(dtype: Any) -> None:
    import torch

    from fastbert.kernels import rows

    x, index = torch.empty(TOKENS, 768, dtype=dtype), torch.zeros(MASKED, dtype=torch.int64)
    rows.scatter_rows(rows.gather_rows(x, index), index, TOKENS)


def _linear_int8(dtype: Any) -> None:
    import torch

    from fastbert.kernels import linear_int8

    weight, weight_scale = torch.empty(3072, 768, dtype=torch.int8), torch.empty(3072)
    for tokens in (TOKENS, 64, 16):
        q, scale, offset = linear_int8.quantize_rows(torch.empty(tokens, 768, dtype=dtype))
        by_column = (weight_scale, offset, weight_scale)
        for output_scale in (None, torch.empty(1)):
            linear_int8.linear_int8(
                q, scale, weight, weight_scale, *by_column, 1, dtype, output_scale
            )


def _add_layer_norm_int8(dtype: Any, width: int) -> None:
    import torch

    from fastbert.kernels import add_layer_norm

    x, vector = torch.empty(TOKENS, width, dtype=dtype), torch.empty(width)
    for multiplier in (vector, None):
        add_layer_norm.add_layer_norm_int8(x, x, vector, vector, vector, multiplier, 1e-12)


def _linear_fp8(dtype: Any) -> None:
    import torch

    from fastbert.kernels import _config, linear_fp8

    if _config.capability(torch.empty(0)) < (8, 9):
        return
    weight, weight_scale = torch.empty(3072, 768).to(torch.float8_e4m3fn), torch.empty(3072)
    for tokens in (TOKENS, 64, 16):
        q, scale = linear_fp8.quantize_rows_fp8(torch.empty(tokens, 768, dtype=dtype))
        linear_fp8.linear_fp8(q, scale, weight, weight_scale, weight_scale, 1, dtype)


def _optimizer(dtype: Any, copies: bool) -> None:
    """AdamW and LAMB on fp32 parameters with gradients of ``dtype``; copies: written in it too."""
    import torch

    from fastbert.kernels import optimizer

    if copies and dtype == torch.float32:
        return
    arrays = [torch.empty(1 << 20) for _ in range(3)]
    param, exp_avg, exp_avg_sq = arrays
    grad, one = torch.empty(1 << 20, dtype=dtype), torch.ones(())
    copy = torch.empty_like(grad) if copies else None
    tables = optimizer.tabulate([(param, grad, exp_avg, exp_avg_sq, copy, one, one, 0.01)])
    common = (tables, (0.9, 0.999), 1e-6, True, torch.ones(1))
    optimizer.adamw_step(*common)
    optimizer.lamb_step(*common, None)


CASES: dict[str, Callable[[Any], None]] = {
    "attention": partial(_attention, head_dim=64, p=0.0),
    "attention dropout": partial(_attention, head_dim=64, p=0.1),
    "attention short": partial(_attention_bwd, way="short", head_dim=64, p=0.0),
    "attention short dropout": partial(_attention_bwd, way="short", head_dim=64, p=0.1),
    "bias_gelu erf": partial(_bias_gelu, tanh=False),
    "bias_gelu tanh": partial(_bias_gelu, tanh=True),
    "add_layer_norm": partial(_add_layer_norm, width=768, p=0.0),
    "add_layer_norm dropout": partial(_add_layer_norm, width=768, p=0.1),
    "embed_layer_norm dropout": partial(_embed_layer_norm, width=768, p=0.1),
    "cross_entropy_rows": _cross_entropy_rows,
    "rows": _rows,
    "linear_int8 gelu": _linear_int8,
    "add_layer_norm_int8": partial(_add_layer_norm_int8, width=768),
    "linear_fp8 gelu": _linear_fp8,
    "feed_forward erf": partial(_feed_forward, tanh=False),
    "optimizer": partial(_optimizer, copies=False),
    "optimizer copies": partial(_optimizer, copies=True),
    # Beyond BERT-base.
    "attention D=32 dropout": partial(_attention, head_dim=32, p=0.1),
    "attention D=40 dropout": partial(_attention, head_dim=40, p=0.1),
    "attention D=128": partial(_attention, head_dim=128, p=0.0),
    "attention D=128 dropout": partial(_attention, head_dim=128, p=0.1),
    "attention D=256 dropout": partial(_attention, head_dim=256, p=0.1),
    "attention short D=32": partial(_attention_bwd, way="short", head_dim=32, p=0.0),
    "attention short D=32 dropout": partial(_attention_bwd, way="short", head_dim=32, p=0.1),
    "attention short D=40 dropout": partial(_attention_bwd, way="short", head_dim=40, p=0.1),
    "attention short D=128": partial(_attention_bwd, way="short", head_dim=128, p=0.0),
    "attention short D=128 dropout": partial(_attention_bwd, way="short", head_dim=128, p=0.1),
    "attention bias": partial(_attention, head_dim=64, p=0.0, bias=True),
    "attention bias dropout": partial(_attention, head_dim=64, p=0.1, bias=True),
    "attention bias D=32 dropout": partial(_attention, head_dim=32, p=0.1, bias=True),
    "attention bias D=128 dropout": partial(_attention, head_dim=128, p=0.1, bias=True),
    "attention bias D=256 dropout": partial(_attention, head_dim=256, p=0.1, bias=True),
    "attention short bias": partial(_attention_bwd, way="short", head_dim=64, p=0.0, bias=True),
    "attention short bias dropout": partial(
        _attention_bwd, way="short", head_dim=64, p=0.1, bias=True
    ),
    "attention short bias D=32 dropout": partial(
        _attention_bwd, way="short", head_dim=32, p=0.1, bias=True
    ),
    "attention one pass bias": partial(
        _attention_bwd, way="one_pass", head_dim=64, p=0.0, bias=True
    ),
    "attention one pass bias dropout": partial(
        _attention_bwd, way="one_pass", head_dim=64, p=0.1, bias=True
    ),
    "attention one pass": partial(_attention_bwd, way="one_pass", head_dim=64, p=0.0),
    "attention one pass dropout": partial(_attention_bwd, way="one_pass", head_dim=64, p=0.1),
    "attention mask": partial(_attention, head_dim=64, p=0.1, mask=True),
    "attention mask D=32": partial(_attention, head_dim=32, p=0.1, mask=True),
    "attention mask D=128": partial(_attention, head_dim=128, p=0.1, mask=True),
    "attention mask bias": partial(_attention, head_dim=64, p=0.1, bias=True, mask=True),
    "attention D=256 mask": partial(_attention, head_dim=256, p=0.1, mask=True),
    "attention short mask": partial(_attention_bwd, way="short", head_dim=64, p=0.1, mask=True),
    "attention short mask D=32": partial(
        _attention_bwd, way="short", head_dim=32, p=0.1, mask=True
    ),
    "attention short mask D=128": partial(
        _attention_bwd, way="short", head_dim=128, p=0.1, mask=True
    ),
    "attention one pass mask": partial(
        _attention_bwd, way="one_pass", head_dim=64, p=0.1, mask=True
    ),
    "attention list": partial(_attention, head_dim=64, p=0.0, longest_first=True),
    "attention list dropout": partial(_attention, head_dim=64, p=0.1, longest_first=True),
    "attention list D=32": partial(_attention, head_dim=32, p=0.0, longest_first=True),
    "attention list D=32 dropout": partial(_attention, head_dim=32, p=0.1, longest_first=True),
    "attention list D=128": partial(_attention, head_dim=128, p=0.0, longest_first=True),
    "attention list D=128 dropout": partial(_attention, head_dim=128, p=0.1, longest_first=True),
    "attention D=256 list dropout": partial(_attention, head_dim=256, p=0.1, longest_first=True),
    "attention list bias": partial(_attention, head_dim=64, p=0.0, bias=True, longest_first=True),
    "attention list bias dropout": partial(
        _attention, head_dim=64, p=0.1, bias=True, longest_first=True
    ),
    "attention list bias D=128 dropout": partial(
        _attention, head_dim=128, p=0.1, bias=True, longest_first=True
    ),
    "attention list mask": partial(_attention, head_dim=64, p=0.1, mask=True, longest_first=True),
    "feed_forward tanh": partial(_feed_forward, tanh=True),
    "add_layer_norm H=1024 dropout": partial(_add_layer_norm, width=1024, p=0.1),
    "add_layer_norm H=4096 dropout": partial(_add_layer_norm, width=4096, p=0.1),
    "embed_layer_norm": partial(_embed_layer_norm, width=768, p=0.0),
    "embed_layer_norm H=1024 dropout": partial(_embed_layer_norm, width=1024, p=0.1),
}
BASE_CASES = 17  # the first ones
