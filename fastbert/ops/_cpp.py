"""Launchers of the C++ kernels (csrc/cpu): CPU tensors in, CPU tensors out, no autograd.

Each function has the contract of the op that it is named after (the op's file holds equation and
shapes; ``_registry`` says how halves are named). A launcher makes its inputs contiguous, allocates
the outputs and hands addresses, sizes and dtype codes to ``fastbert._cpu``; sizes are the callers'
to check. Kernels use at most ``_num_threads()`` threads and give the same bits with any number of
them. ValueError: an id, a label, an index or cu_seqlens is out of range (the text says
which element), or a dtype is not one of the kernels'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fastbert import _native, device
from fastbert.ops._recycled import recycled_like

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

_forced_threads = device.setting("FASTBERT_NUM_THREADS")


def _num_threads() -> int:
    """FASTBERT_NUM_THREADS if it is set, else as many threads as torch's own ops use now."""
    return int(_forced_threads) if _forced_threads else torch.get_num_threads()


def isa() -> str:
    """The instruction set that the kernels use: one of ``available_isas()``."""
    return _native.cpu().isa()


def available_isas() -> list[str]:
    """Those that this machine can run, best first."""
    return _native.cpu().available_isas()


def set_isa(name: str) -> None:
    """Make the kernels use ``name``. ValueError, naming the available ones, if it is not there."""
    _native.cpu().set_isa(name)


def attention_fwd(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    bias: None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (T, N, D), lse (N, T). The kernels take no bias (``Op.no_bias``)."""
    qkv = qkv.contiguous()
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    lse = qkv.new_empty(heads, tokens, dtype=_statistic(qkv))
    cu_seqlens = cu_seqlens.contiguous()
    _native.cpu().attention_fwd(
        qkv.data_ptr(), cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, tokens, heads, head_dim,
        max_seqlen, softmax_scale, *_dropout(dropout_p, dropout_seed, dropout_offset),
        out.data_ptr(), lse.data_ptr(), _code(qkv.dtype), _num_threads(),
    )  # fmt: skip
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
    bias: None = None,
) -> torch.Tensor:
    """dqkv (T, 3, N, D). The kernels take no bias (``Op.no_bias``)."""
    dout, qkv, out, lse = (x.contiguous() for x in (dout, qkv, out, lse))
    tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    cu_seqlens = cu_seqlens.contiguous()
    _native.cpu().attention_bwd(
        dout.data_ptr(), qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens.data_ptr(),
        cu_seqlens.numel() - 1, tokens, heads, head_dim, max_seqlen, softmax_scale,
        *_dropout(dropout_p, dropout_seed, dropout_offset),
        dqkv.data_ptr(), _code(qkv.dtype), _num_threads(),
    )  # fmt: skip
    return dqkv


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    """y (T, I)."""
    x = x.contiguous()
    rows, cols = x.shape
    (bias,), vector_code = _vectors(x, bias)
    y = torch.empty_like(x)
    _native.cpu().bias_gelu_fwd(
        x.data_ptr(), _address(bias), rows, cols, tanh, y.data_ptr(),
        _code(x.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return y


def bias_gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx (T, I), dbias (I) or None."""
    dy, x = dy.contiguous(), x.contiguous()
    rows, cols = x.shape
    (bias,), vector_code = _vectors(x, bias)
    dx = torch.empty_like(x)
    dbias = None if bias is None else torch.empty_like(bias)
    _native.cpu().bias_gelu_bwd(
        dy.data_ptr(), x.data_ptr(), _address(bias), rows, cols, tanh, dx.data_ptr(),
        _address(dbias), _code(x.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return dx, dbias


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y (T, H); with ``save`` also z (T, H), mean and rstd (T), else None."""
    x = x.contiguous()
    residual = _contiguous(residual)
    rows, cols = x.shape
    (x_bias, weight, bias), vector_code = _vectors(x, x_bias, weight, bias)
    y = torch.empty_like(x)
    z = mean = rstd = None
    if save:
        z = torch.empty_like(x)
        mean, rstd = (x.new_empty(rows, dtype=_statistic(x)) for _ in range(2))
    _native.cpu().add_layer_norm_fwd(
        x.data_ptr(), _address(residual), _address(x_bias), weight.data_ptr(), bias.data_ptr(),
        rows, cols, eps, *_dropout(dropout_p, dropout_seed, dropout_offset),
        y.data_ptr(), _address(z), _address(mean), _address(rstd),
        _code(x.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return y, z, mean, rstd


def add_layer_norm_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dropout_offset: int,
    need_x_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dz, dx (T, H), one tensor without dropout; dweight, dbias (H); dx_bias (H) or None."""
    dy, z, mean, rstd = (x.contiguous() for x in (dy, z, mean, rstd))
    rows, cols = z.shape
    (weight,), vector_code = _vectors(z, weight)
    dz = torch.empty_like(z)
    dx = dz if dropout_p == 0.0 else torch.empty_like(z)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    dx_bias = torch.empty_like(weight) if need_x_bias else None
    _native.cpu().add_layer_norm_bwd(
        dy.data_ptr(), z.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows, cols, *_dropout(dropout_p, dropout_seed, dropout_offset),
        dz.data_ptr(), 0 if dx is dz else dx.data_ptr(),
        dweight.data_ptr(), dbias.data_ptr(), _address(dx_bias),
        _code(z.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return dz, dx, dweight, dbias, dx_bias


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
    """y (T, H), mean and rstd (T)."""
    ids, tables, sizes = _embedding(
        (input_ids, position_ids, token_type_ids), (word, position, token_type)
    )
    rows, cols = input_ids.numel(), word.shape[1]
    (weight, bias), vector_code = _vectors(word, weight, bias)
    y = word.new_empty(rows, cols)
    mean, rstd = (word.new_empty(rows, dtype=_statistic(word)) for _ in range(2))
    _native.cpu().embed_layer_norm_fwd(
        *map(_address, ids), *map(_address, tables), weight.data_ptr(), bias.data_ptr(),
        rows, cols, *sizes, eps, *_dropout(dropout_p, dropout_seed, dropout_offset),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        _code(word.dtype), vector_code, _num_threads(),
    )  # fmt: skip
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
    """dword (V, H), dposition (P, H), dtoken_type (K, H) or None; dweight, dbias (H)."""
    dy, mean, rstd = (x.contiguous() for x in (dy, mean, rstd))
    ids, tables, sizes = _embedding(
        (input_ids, position_ids, token_type_ids), (word, position, token_type)
    )
    rows, cols = input_ids.numel(), word.shape[1]
    (weight,), vector_code = _vectors(word, weight)
    # The kernel writes what is not 0 already, and reads the rest.
    dword = recycled_like(tables[0])
    dtables: list[Any] = [dword, *(None if t is None else torch.empty_like(t) for t in tables[1:])]
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    _native.cpu().embed_layer_norm_bwd(
        dy.data_ptr(), *map(_address, ids), *map(_address, tables), weight.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), rows, cols, *sizes,
        *_dropout(dropout_p, dropout_seed, dropout_offset),
        *map(_address, dtables), dweight.data_ptr(), dbias.data_ptr(),
        _code(word.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return (*dtables, dweight, dbias)


def cross_entropy_rows(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    grad_scale: torch.Tensor | None,
) -> torch.Tensor:
    """loss (M); with ``grad_scale`` the logits become their gradient in place."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: got strides {logits.stride()}, expected contiguous rows")
    rows, classes = logits.shape
    (bias,), vector_code = _vectors(logits, bias)
    labels = labels.contiguous()
    loss = logits.new_empty(rows, dtype=_statistic(logits))
    _native.cpu().cross_entropy_rows(
        logits.data_ptr(), logits.stride(0), _address(bias), labels.data_ptr(), rows, classes,
        ignore_index, grad_scale is not None, 0.0 if grad_scale is None else grad_scale.item(),
        loss.data_ptr(), _code(logits.dtype), vector_code, _num_threads(),
    )  # fmt: skip
    return loss


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(M, H): the rows of x (R, H) at ``index``, strictly ascending."""
    x, index = x.contiguous(), index.contiguous()
    rows, cols = x.shape
    out = x.new_empty(index.numel(), cols)
    _native.cpu().gather_rows(
        x.data_ptr(), index.data_ptr(), index.numel(), rows, cols, out.data_ptr(), _code(x.dtype),
        _num_threads(),
    )  # fmt: skip
    return out


def scatter_rows(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows, H): the rows of x (M, H) at ``index``, strictly ascending, and zeros elsewhere."""
    x, index = x.contiguous(), index.contiguous()
    count, cols = x.shape
    out = x.new_empty(num_rows, cols)
    _native.cpu().scatter_rows(
        x.data_ptr(), index.data_ptr(), count, num_rows, cols, out.data_ptr(), _code(x.dtype),
        _num_threads(),
    )  # fmt: skip
    return out


def few_rows_product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x (R, K) w (N, K)^T into out (R, N), whose rows may lie apart: fp32 or bf16, sums in fp32."""
    x, w = x.contiguous(), w.contiguous()
    _native.cpu().few_rows_product(
        x.data_ptr(), w.data_ptr(), *x.shape, w.shape[0], out.data_ptr(), out.stride(0),
        _code(x.dtype), _num_threads(),
    )  # fmt: skip
    return out


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements of ``tensors``, 0-d fp64."""
    tensors = [x.contiguous() for x in tensors]
    listed = torch.tensor([(x.data_ptr(), x.numel(), _code(x.dtype)) for x in tensors])
    total = torch.empty((), dtype=torch.float64)
    _native.cpu().squared_norm(listed.data_ptr(), len(tensors), total.data_ptr(), _num_threads())
    return total


def adamw_step(
    slots: Sequence[Any],
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    grad_scale: torch.Tensor | None,
) -> None:
    """One step of every ``ops.optimizer.Slot`` of contiguous tensors: parameter and moments fp32,
    the gradient fp32 or bf16, the copy bf16."""
    words = [
        (
            p.numel(), p.data_ptr(), grad.data_ptr(), _code(grad.dtype), m.data_ptr(), v.data_ptr(),
            _address(copy), step.data_ptr(),
        )
        for p, grad, m, v, copy, step, _, _ in slots
    ]  # fmt: skip
    rates = [(float(slot.lr), slot.weight_decay) for slot in slots]
    table = torch.cat(
        [torch.tensor(words), torch.tensor(rates, dtype=torch.float64).view(torch.int64)], 1
    )
    _native.cpu().adamw_step(
        table.data_ptr(), len(slots), *betas, eps, bias_correction,
        1.0 if grad_scale is None else grad_scale.item(), _num_threads(),
    )  # fmt: skip
    # As torch's own do, so that autograd notices when a graph is walked that needs the old values.
    torch.autograd.graph.increment_version(
        [x for slot in slots for x in (slot.param, slot.copy) if x is not None]
    )


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _code(dtype: torch.dtype) -> int:
    if dtype not in _CODES:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _CODES))}")
    return _CODES[dtype]


def _statistic(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dropout(p: float, seed: torch.Tensor | None, offset: int) -> tuple[float, int, int]:
    return p, 0 if p == 0.0 or seed is None else int(seed.item()), offset


def _vectors(x: torch.Tensor, *vectors: torch.Tensor | None) -> tuple[list[Any], int]:
    """The vectors in the one dtype that a kernel takes them in, and its code.

    Each may come in the dtype of ``x`` or in fp32; where both occur the wider serves all.
    """
    dtypes = {v.dtype for v in vectors if v is not None}
    if not dtypes <= {x.dtype, torch.float32}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"vectors beside {x.dtype} activations: got {names}, expected it or fp32")
    if len(dtypes) > 1:
        common = functools.reduce(torch.promote_types, dtypes)
        vectors = tuple(None if v is None else v.to(common) for v in vectors)
    else:
        common = dtypes.pop() if dtypes else x.dtype
    return [None if v is None else v.contiguous() for v in vectors], _code(common)


def _embedding(
    ids: tuple[torch.Tensor | None, ...], tables: tuple[torch.Tensor | None, ...]
) -> tuple[list[Any], list[Any], list[int]]:
    """Ids (input, position, token type) and their tables, contiguous, and the tables' rows."""
    if (ids[2] is None) != (tables[2] is None):
        raise ValueError("token_type_ids and token_type: got one without the other")
    dtypes = {table.dtype for table in tables if table is not None}
    if len(dtypes) > 1:
        raise ValueError(f"embedding tables: got {sorted(map(str, dtypes))}, expected one dtype")
    sizes = [0 if table is None else table.shape[0] for table in tables]
    return [_contiguous(x) for x in ids], [_contiguous(x) for x in tables], sizes


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
