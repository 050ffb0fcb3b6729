"""The matrix products around the ops: torch's BLAS, by the fastest route on this machine."""

from __future__ import annotations

import functools

import torch

from fastbert import device

# From so many rows on, widening both factors pays for itself (see widens).
_WIDE_ROWS = 128


@functools.cache
def _bf16_is_slow_on_cpu() -> bool:
    return "amx_bf16" not in device.cpu_flags()


def widens(a: torch.Tensor, rows: int) -> bool:
    """Whether a bf16 product of ``rows`` rows on this CPU is faster through fp32.

    Without AMX, oneDNN's bf16 product reaches 150 GFLOP/s where MKL's fp32 one reaches 250 (two
    Sapphire Rapids cores, AMX masked, AVX-512 BF16 there): its dot-product instruction issues once
    a cycle, half as often as the fp32 FMA, and without AVX-512 BF16 there is no instruction at all.
    Products of bf16 numbers are exact in fp32 and both routes sum in fp32, so the results differ
    only in the order of the sum.
    """
    return (
        a.dtype == torch.bfloat16
        and a.device.type == "cpu"
        and rows >= _WIDE_ROWS
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
