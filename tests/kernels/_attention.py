"""The oracle of the attention kernels' own tests: softmax attention, one sequence at a time."""

from __future__ import annotations

import numpy as np
import torch

from ._parity import DEVICE, dropout_factors


def attention_formula(qkv, *, lengths, factors=None, bias=None):
    """out (T, N, D) of qkv (T, 3, N, D).

    factors: what dropout multiplies the probabilities (N, S, S) of each sequence by.
    bias: (1 or N, T, W), of which a row of -inf alone gives probabilities of 0.
    """
    outs, first = [], 0
    for i, part in enumerate(qkv.split(lengths)):
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * qkv.shape[3] ** -0.5
        if bias is not None:
            rows = slice(first, first + lengths[i])
            scores = scores + bias[:, rows, : lengths[i]].to(scores.dtype)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        first += lengths[i]
        if factors is not None:
            p = p * factors[i].to(p.dtype)
        outs.append((p @ v).transpose(0, 1))
    return torch.cat(outs)


def attention_factors(lengths, num_heads, p):
    """The ``factors`` of dropout with probability ``p``; None for 0."""
    if p == 0.0:
        return None
    factors, first = [], 0
    for length in lengths:
        row = first + np.arange(length)[None, :, None]
        plane = np.arange(num_heads)[:, None, None]
        factors.append(dropout_factors(p, row, np.arange(length)[None, None, :], plane))
        first += length
    return factors


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
