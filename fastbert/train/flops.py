"""How much of what the device could compute a model makes of it: model FLOPs and MFU.

    MFU = model FLOPs of the tokens / (seconds · peak)        (PaLM, arXiv 2204.02311, appendix B)

Model FLOPs are those of the matrix products that training by the paper's equations needs, forward
and, twice as many, backward; an addition and a multiplication are two. What is computed again
(checkpointing), beside products (LayerNorm, softmax, optimiser) or on padding does not count, nor
does what is left out as nobody reads it: rows of the last layer, tokens without a label.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastbert import device as devices
from fastbert.config import BertConfig

TRAINING = 3
"""Forward and backward, in forward passes."""


def encoder_flops(config: BertConfig, lengths: Sequence[int], rows: int | None = None) -> int:
    """Of the forward pass of L layers over sequences of these lengths, T = sum_b n_b tokens:

        sum over layers of  2 T · 3 H² + 2 R · (H² + 2 H I)  +  4 H sum_b n_b²

    R is T, and ``rows`` in the last layer unless None. In training, three times that, and for T
    tokens in sequences of n each this is appendix B's 6 N + 12 L H n a token, N the weights of the
    layers' matrices: embeddings are looked up, not multiplied.
    """
    tokens, hidden = sum(lengths), config.hidden_size
    behind = hidden * hidden + 2 * hidden * config.intermediate_size
    attention = 2 * tokens * 3 * hidden * hidden + 4 * hidden * sum(n * n for n in lengths)
    layers = config.num_hidden_layers
    if not layers:
        return 0
    computed = (layers - 1) * tokens + (tokens if rows is None else rows)
    return layers * attention + 2 * computed * behind


def matrix_weights(module: nn.Module) -> int:
    """How many weights its matrices have, embedding tables apart: what one row is multiplied by."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if p.dim() == 2 and id(p) not in tables)


class Peak(NamedTuple):
    """flop_s: FLOPs a second that one device reaches at best.  source: who says so."""

    flop_s: float
    source: str


class _Rates(NamedTuple):
    """TFLOP/s of dense matrix products with fp32 sums: 16-bit, TF32 and fp32 operands."""

    half: float
    tf32: float
    fp32: float


class Meter:
    """Tokens a second and MFU since it was last read.

    peak: of a device.  devices: how many compute together.
    """

    def __init__(self, peak: Peak, devices: int = 1) -> None:
        self.peak, self.devices = peak, devices
        self._tokens = self._flops = 0
        self._seconds = 0.0

    def add(self, tokens: int, flops: int, seconds: float) -> None:
        """Work of all devices together."""
        self._tokens += tokens
        self._flops += flops
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """{"tokens_per_s": …, "mfu": …}; counts from 0 on again."""
        seconds = max(self._seconds, 1e-9)
        rate = self._tokens / seconds
        mfu = self._flops / (seconds * self.peak.flop_s * self.devices)
        self._tokens, self._flops, self._seconds = 0, 0, 0.0
        return {"tokens_per_s": round(rate, 1), "mfu": round(mfu, 5)}


# By a word of the GPU's name; the most words decide. From NVIDIA's datasheets and, for GeForce,
# the architecture's white paper; where these give rates "with sparsity", half of them.
_GPUS = {
    "B200": _Rates(2250, 1100, 75),
    "GH200": _Rates(989.5, 494.7, 67),
    "H200": _Rates(989.5, 494.7, 67),
    "H100": _Rates(989.5, 494.7, 67),
    "H100 NVL": _Rates(835.5, 417.5, 60),
    "H100 PCIe": _Rates(756, 378, 51),
    "A100": _Rates(312, 156, 19.5),
    "A10": _Rates(125, 62.5, 31.2),
    "L40S": _Rates(362, 183, 91.6),
    "L4": _Rates(121, 60, 30.3),
    "RTX A6000": _Rates(154.8, 77.4, 38.7),
    "RTX 4090": _Rates(165.2, 82.6, 82.6),
    "RTX 3090": _Rates(71, 35.6, 35.6),
    "V100": _Rates(125, 15.7, 15.7),  # no TF32 before Ampere
    "T4": _Rates(65, 8.1, 8.1),
}


def peak(device: torch.device, precision: str) -> Peak:
    """What one device computes at best in a run of this precision: "no", "bf16" or "fp16".

    Of a GPU that is listed here its datasheet says it. Of a CPU, and of any other GPU, it is
    measured now, which takes a moment: a product of two square matrices in the run's precision, on
    a CPU also in fp32, which may be the faster way to multiply bf16 (``ops._matmul.widens``).
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        name = devices.cuda_name(index)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        rates = _rates(name)
        if rates is not None:
            form = "half" if precision != "no" else "tf32" if tf32 else "fp32"
            return Peak(getattr(rates, form) * 1e12, f"datasheet of {name}")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type != "cpu":
        return _measured(device, dtype)
    measured = [_measured(device, kind) for kind in {dtype, torch.float32}]
    return max(measured, key=lambda found: found.flop_s)


def _rates(name: str) -> _Rates | None:
    """Of a GPU as torch names it, such as ``NVIDIA H100 80GB HBM3``."""
    words = set(re.split(r"[\s-]+", name))
    known = [key for key in _GPUS if words.issuperset(key.split())]
    return _GPUS[max(known, key=lambda key: len(key.split()))] if known else None


def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    side, seconds = (4096 if device.type == "cuda" else 1024), 0.2
    # A generator of its own: the run's draws the same numbers whether this was measured or not.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == float("inf"):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    kind = str(dtype).removeprefix("torch.")
    return Peak(2 * side**3 / fastest, f"measured: a product of {side} x {side} in {kind}")
