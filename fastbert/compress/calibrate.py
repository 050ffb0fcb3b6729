"""Static activation scales: one threshold a Linear's input, from what calibration data puts there.

Values beyond the threshold saturate at 127; a lower one spends the 127 steps on the many, a higher
one on the few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.compress import torch_path
from fastbert.compress.weights import FloatWeights
from fastbert.packed import PackedBatch

Tensor = torch.Tensor

BINS = 4096  # of |x| from 0 to the largest seen
LEVELS = 128  # of int8 magnitudes, zero among them
PERCENTILE = 99.999


def input_scales(
    weights: FloatWeights,
    batches: Iterable[PackedBatch],
    method: str,
    smoothing: Mapping[str, Tensor],
) -> dict[str, float]:
    """x_scale of every Linear: threshold / 127, the threshold by one of METHODS.

    smoothing: Linear -> what its input is divided by before it is quantised.
    """
    batches = list(batches)
    largest: dict[str, float] = {}

    def smooth(name: str, x: Tensor) -> Tensor:
        return x / smoothing[name] if name in smoothing else x

    def note_largest(name: str, x: Tensor) -> None:
        x = smooth(name, x)
        largest[name] = max(largest.get(name, 0.0), float(x.abs().max()) if x.numel() else 0.0)

    watch_inputs(weights, batches, note_largest)
    if method == "max":
        return {name: _scale(top) for name, top in largest.items()}
    histograms = {name: torch.zeros(BINS, dtype=torch.float64) for name in largest}

    def count(name: str, x: Tensor) -> None:
        histograms[name] += histogram(smooth(name, x), largest[name])

    watch_inputs(weights, batches, count)
    threshold = METHODS[method]
    return {name: _scale(threshold(histograms[name], largest[name])) for name in largest}


def _scale(threshold: float) -> float:
    return threshold / 127 if threshold > 0 else 1.0


def watch_inputs(
    weights: FloatWeights, batches: Iterable[PackedBatch], watch: Callable[[str, Tensor], Any]
) -> None:
    """Call ``watch(name, x)`` with the fp32 input x (T, K) of every Linear, batch after batch."""
    tensors: Mapping[str, Tensor] = weights.tensors

    def linear(name: str, x: Tensor) -> Tensor:
        watch(name, x)
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    with torch.no_grad():
        for batch in batches:
            torch_path.encode(weights.config, tensors, batch, linear=linear)


def histogram(x: Tensor, largest: float) -> Tensor:
    """How many |x| lie in each of BINS equal bins from 0 to ``largest``, float64."""
    top = largest if largest > 0 else 1.0
    return torch.histc(x.abs().float(), BINS, 0.0, top).double()


# --- thresholds: (histogram, largest value) -> threshold ------------------------------------------


def by_max(counts: Tensor, largest: float) -> float:
    return largest


def by_percentile(counts: Tensor, largest: float) -> float:
    """The upper edge of the bin in which PERCENTILE percent of all values are reached."""
    total = counts.cumsum(0)
    reached = int((total < total[-1] * (PERCENTILE / 100)).sum())
    return largest * min(reached + 1, BINS) / BINS


def by_mse(counts: Tensor, largest: float) -> float:
    """The t that makes sum_x (x - Q_t(x))^2 least, Q_t rounding to multiples of t / 127."""
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    candidates = largest * torch.arange(1, BINS // 16 + 1, dtype=torch.float64) / (BINS // 16)
    steps = (candidates / 127)[:, None]
    rounded = torch.clamp((centres / steps).round(), max=127) * steps
    errors = ((centres - rounded).square() * counts).sum(1)
    return float(candidates[errors.argmin()])


def by_entropy(counts: Tensor, largest: float) -> float:
    """The threshold that makes KL(P || Q) least, with P the values cut off at the threshold and Q
    the same in 128 levels (Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    best, threshold = float("inf"), largest
    for bins in range(LEVELS, BINS + 1, LEVELS // 2):
        clipped = counts[:bins].clone()
        clipped[-1] += counts[bins:].sum()
        divergence = _divergence(clipped, _levelled(counts[:bins]))
        if divergence < best:
            best, threshold = divergence, largest * bins / BINS
    return threshold


def _levelled(counts: Tensor) -> Tensor:
    """Each of LEVELS groups of bins shares its count evenly among its bins that are not empty."""
    level = torch.arange(len(counts)) * LEVELS // len(counts)
    filled = (counts > 0).double()
    total = torch.zeros(LEVELS, dtype=torch.float64).index_add(0, level, counts)
    members = torch.zeros(LEVELS, dtype=torch.float64).index_add(0, level, filled)
    return (total / members.clamp(min=1))[level] * filled


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(P || Q) of two histograms; where Q is empty and P is not, Q gets a trace."""
    if not float(p.sum()) or not float(q.sum()):
        return float("inf")
    p, q = p / p.sum(), (q / q.sum()).clamp(min=1e-9)
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


METHODS: dict[str, Callable[[Tensor, float], float]] = {
    "max": by_max,
    "percentile": by_percentile,
    "entropy": by_entropy,
    "mse": by_mse,
}
