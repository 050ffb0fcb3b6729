"""packed_layout: where the real tokens of a padded batch stand, by its mask on the device."""

from __future__ import annotations

import torch
from torch._library.fake_impl import allocate_size

from fastbert.ops import _check
from fastbert.ops._library import define


def packed_layout(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For T real tokens, T_b of them in row b, and F rows that hold any:

    indices (T,) int64, ascending: places b * S + s of the real tokens.
    cu_seqlens (B + 1,) int32: 0, T_0, T_0 + T_1, …
    occupied (F,) int64, ascending: the rows b with T_b > 0.

    mask: (B, S) of any dtype, nonzero for real tokens, anywhere in a row.
    T and F depend on the mask's values: on a GPU the call waits for the device. In a graph of
    torch.compile they are sizes without a value, and one graph serves every mask.
    Raises ValueError for a mask that is not (B, S).
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(f"mask: got {_check.describe(mask)}, expected shape (B, S)")
    return (_compiled if torch.compiler.is_compiling() else _layout)(mask)


def _layout(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    real = mask != 0
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(real.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return real.flatten().nonzero().flatten(), cu_seqlens, real.any(1).nonzero().flatten()


def _fake(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    context = torch.library.get_ctx()
    if context._shape_env is None:
        context.new_dynamic_size()  # raises what a tracer without symbolic sizes expects

    def empty(bound: int | torch.SymInt) -> torch.Tensor:
        # The context's own new_dynamic_size refuses outside of fullgraph=True, until a user sets
        # capture_dynamic_output_shape_ops, which is a statement about all code of theirs.
        most = bound if isinstance(bound, int) else None
        size = allocate_size(context._shape_env, 0, most)
        return mask.new_empty(size, dtype=torch.int64)

    rows, columns = mask.shape
    cu_seqlens = mask.new_empty(rows + 1, dtype=torch.int32)
    return empty(rows * columns), cu_seqlens, empty(rows)


_compiled = define("packed_layout", "(Tensor mask) -> (Tensor, Tensor, Tensor)", _layout, _fake)
