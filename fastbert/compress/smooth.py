"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of activations moved into the weights.

With s_j > 0, ``(X diag(s)^-1) (diag(s) W)`` is ``X W``, and the two factors quantise better than X
and W where a few channels of X are far larger than the others. QKV and the first FFN matrix read
the output of a LayerNorm. In a post-LN encoder the residual reads it too, so that the division
cannot fold into the LayerNorm's own parameters: the engine applies it to what it quantises alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastbert.compress.calibrate import watch_inputs
from fastbert.compress.weights import FloatWeights
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

_SMOOTHED = (".qkv", ".up")


def factors(input_max: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max |X_j|^alpha / max |W_j|^(1 - alpha) (eq. 4), 1 where either is 0.

    input_max: (K), the largest |X_j| seen.  weight: (N, K).
    """
    weight_max = weight.abs().amax(0)
    s = input_max.pow(alpha) / weight_max.pow(1 - alpha)
    return torch.where((input_max > 0) & (weight_max > 0), s, 1.0)


def smoothing(
    weights: FloatWeights, batches: Iterable[PackedBatch], alpha: float
) -> dict[str, Tensor]:
    """s (K) of every QKV and first FFN Linear."""
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        if name.endswith(_SMOOTHED) and len(x):
            top = x.abs().amax(0)
            largest[name] = torch.maximum(largest[name], top) if name in largest else top

    watch_inputs(weights, batches, note)
    return {
        name: factors(top, weights.tensors[f"{name}.weight"], alpha)
        for name, top in largest.items()
    }
