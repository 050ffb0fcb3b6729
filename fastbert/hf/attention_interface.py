"""``attn_implementation="fastbert"``: the packed attention for any other encoder of transformers.

Models that ``accelerate`` does not know can still run their attention on fastbert's kernels,
through the two interfaces that transformers offers for it. Only bidirectional self-attention.
In a graph of torch.compile the layout itself goes from layer to layer in place of the mask.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from fastbert.ops import attention
from fastbert.packed import PackedBatch, TracedBatch

Tensor = torch.Tensor
NAME = "fastbert"


@functools.cache
def register_attention() -> None:
    """Make ``attn_implementation="fastbert"`` a choice in transformers. Safe to call again."""
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(NAME, attention_forward)
    masking.AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | PackedBatch | None:
    """The 2-D padding mask as it came, or, in a graph, its layout; None when nothing is padded.

    Raises ValueError for anything but bidirectional self-attention.
    """
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            f"attn_implementation={NAME!r}: got a causal, sliding or composed mask, expected "
            "bidirectional attention"
        )
    if q_length != kv_length:
        raise ValueError(
            f"attn_implementation={NAME!r}: got {q_length} queries and {kv_length} keys, expected "
            "self-attention"
        )
    if attention_mask is None:
        return None
    # One layout for all layers: finding the lengths waits for the device.
    layout = _layout(attention_mask)
    if torch.compiler.is_compiling():
        return layout
    mask = attention_mask.bool()
    mask.fastbert_layout = layout  # type: ignore[attr-defined]
    return mask


def _layout(mask: Tensor) -> PackedBatch:
    kind = TracedBatch if torch.compiler.is_compiling() else PackedBatch
    return kind.from_padded(mask.long(), mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedBatch | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """out (B, S, N, D) of query, key and value (B, N, S, D) under a (B, S) mask, or what
    ``padding_mask`` makes of it; padding gives 0.

    Raises ValueError for causal attention, for key heads that queries share, for cross-attention
    and for a mask of more than two dimensions.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal and query.shape[2] > 1:
        raise ValueError(
            f"attn_implementation={NAME!r}: got causal attention, expected bidirectional"
        )
    if query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            f"attn_implementation={NAME!r}: got query {tuple(query.shape)}, key {tuple(key.shape)} "
            f"and value {tuple(value.shape)}, expected one shape"
        )
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got {tuple(attention_mask.shape)}, expected (B, S) under "
            f"attn_implementation={NAME!r}"
        )
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: not supported under attn_implementation={NAME!r}")
    batch, heads, length, dim = query.shape
    layout: Any = attention_mask
    if not torch.compiler.is_compiling():  # where its lengths would be constants of the graph
        layout = getattr(attention_mask, "fastbert_layout", attention_mask)
    if layout is None:
        layout = torch.ones(batch, length, device=query.device)
    if isinstance(layout, Tensor):
        layout = _layout(layout)
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)
    packed = layout.pack(qkv.reshape(batch, length, 3 * heads * dim))
    assert packed is not None
    seed = None
    if dropout > 0.0:
        span = (-(2**63), 2**63 - 1)
        seed = torch.randint(*span, (1,), dtype=torch.int64, device=query.device)
    out, _ = attention(
        packed.view(-1, 3, heads, dim),
        layout.cu_seqlens,
        layout.max_seqlen,
        softmax_scale=scaling,
        dropout_p=dropout,
        dropout_seed=seed,
    )
    return layout.unpack(out.reshape(-1, heads * dim)).view(batch, length, heads, dim), None
