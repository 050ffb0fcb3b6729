"""The matrix products around the ops: torch's BLAS, by the fastest route on this machine."""

from __future__ import annotations

import functools

import torch

from fastbert import device
from fastbert.ops import _cpp
from fastbert.ops._registry import OPS

# Up to so many rows, and elements in them, our own product is faster than BLAS (see few_rows).
_FEW_ROWS = 128
_FEW_ELEMENTS = 3 * 2**16
# Other classes of tensors (quantised, distributed, fake ones) know products of their own.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def are_plain(x: torch.Tensor, w: torch.Tensor) -> bool:
    return type(x) in _PLAIN and type(w) in _PLAIN


@functools.cache
def _bf16_is_slow_on_cpu() -> bool:
    return "amx_bf16" not in device.cpu_flags()


@functools.cache
def _blas_is_slow_at_few_rows() -> bool:
    flags = device.cpu_flags()
    return "avx2" in flags and "avx512f" not in flags


def _wide_rows() -> int:
    """From so many rows on, widening both factors pays for itself (see widens)."""
    return 8 if _blas_is_slow_at_few_rows() else 128


def few_rows(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether x w^T has so few rows that our own product is faster on this CPU.

    BLAS packs both factors, which for a query of 16 tokens takes longer than the product. On two
    Zen 3 cores (AVX2), with weights of BERT-base that no cache holds, in fp32 768 x 3072 takes 16
    rows 0.85 ms instead of 2.5, 64 rows 2.6 instead of 4.5 and 128 rows 5.0 instead of 6.6; in
    bf16, which AVX2 has no instruction for, 16 rows 0.62 instead of 4.2 (through fp32: 1.9) and 64
    rows 2.5 instead of 18 (4.7). Beyond 768 KB of x in fp32, as of 128 rows of 3072, L2 does not
    hold it between columns and BLAS, which cuts x too, is faster, as it is from 256 rows on.
    With AVX-512 it has not been measured, and BLAS does it.
    """
    return (
        x.device.type == "cpu"
        and 0 < x.shape[0] <= _FEW_ROWS
        and x.numel() <= _FEW_ELEMENTS
        and x.dtype in (torch.float32, torch.bfloat16)
        and are_plain(x, w)
        and w.is_contiguous()
        and _blas_is_slow_at_few_rows()
        and OPS["bias_gelu"].choice(x, x.shape[1]) == "cpp"
    )


def has_own_route(dtype: torch.dtype) -> bool:
    """Whether ``mm_t`` may do without BLAS, or with that of another dtype, on this CPU."""
    if dtype == torch.bfloat16 and _bf16_is_slow_on_cpu():
        return True
    return dtype in (torch.float32, torch.bfloat16) and _blas_is_slow_at_few_rows()


# What torch.compiler.assume_constant_result does, which imports Dynamo and Triton with it.
has_own_route._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mm_t(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T of x (R, K) and w (N, K), into ``out`` as in ``mm``."""
    if not few_rows(x, w):
        return mm(x, w.t(), out)
    return _cpp.few_rows_product(x, w, x.new_empty(len(x), len(w)) if out is None else out)


def widens(a: torch.Tensor, rows: int) -> bool:
    """Whether a bf16 product of ``rows`` rows on this CPU is faster through fp32.

    Without AMX, oneDNN's bf16 product reaches 150 GFLOP/s where MKL's fp32 one reaches 250 (two
    Sapphire Rapids cores, AMX masked, AVX-512 BF16 there): its dot-product instruction issues once
    a cycle, half as often as the fp32 FMA, and without AVX-512 BF16 there is no instruction at all:
    on a Zen 3 core (AVX2) 8 rows take as long either way, and 64 rows 36 ms instead of 11.
    Products of bf16 numbers are exact in fp32 and both routes sum in fp32, so the results differ
    only in the order of the sum.
    """
    return (
        a.dtype == torch.bfloat16
        and a.device.type == "cpu"
        and rows >= _wide_rows()
        and _bf16_is_slow_on_cpu()
    )


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b, into ``out`` (which may be a column slice of a wider matrix) when given."""
    if widens(a, min(a.shape[0], a.shape[1], b.shape[1])):
        product = torch.mm(a.float(), b.float())
        return product.bfloat16() if out is None else out.copy_(product)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def add_mm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b; to a fp32 total of 16-bit factors in fp32, and on a GPU the product, too, is
    rounded to fp32 alone."""
    if total.dtype == a.dtype and not widens(a, min(a.shape[0], a.shape[1], b.shape[1])):
        return total.addmm_(a, b)
    if total.dtype == torch.float32 and a.is_cuda:
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return total.add_(mm(a, b))


def autocast_to(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype of the autocast region that surrounds the call, if one does."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
