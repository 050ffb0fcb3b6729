"""Dropout masks for the oracles: positions as each op's docstring names them, bits from ops.philox.

test_philox.py checks those bits against an independent Philox.
"""

from __future__ import annotations

import functools

import torch

from fastbert.ops import philox


def seed_tensor(seed: int, device: str = "cpu") -> torch.Tensor:
    """``dropout_seed`` as the ops take it."""
    return torch.tensor([seed], dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=64)
def hidden_mask(
    tokens: int, hidden: int, p: float, seed: int, offset: int, device: str = "cpu"
) -> torch.Tensor | None:
    """True where element (token, channel) of a (T, H) is kept: row = token, plane = 0.

    None for p = 0.
    """
    if p == 0.0:
        return None
    row = torch.arange(tokens, device=device)[:, None]
    col = torch.arange(hidden, device=device)[None, :]
    return philox.keep_mask(seed_tensor(seed, device), offset, p, torch.zeros_like(row), row, col)


@functools.lru_cache(maxsize=64)
def attention_masks(
    lengths: tuple[int, ...], heads: int, p: float, seed: int, offset: int, device: str = "cpu"
) -> list[torch.Tensor | None]:
    """One (N, S, S) a sequence: row = packed query, column = key in its sequence, plane = head.

    Each None for p = 0.
    """
    if p == 0.0:
        return [None] * len(lengths)
    masks, start = [], 0
    head = torch.arange(heads, device=device)[:, None, None]
    for length in lengths:
        row = torch.arange(start, start + length, device=device)[None, :, None]
        col = torch.arange(length, device=device)[None, None, :]
        masks.append(philox.keep_mask(seed_tensor(seed, device), offset, p, head, row, col))
        start += length
    return masks


def drop(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """dropout(x) by a given mask; None keeps x as it is."""
    return x if keep is None else torch.where(keep, x / (1.0 - p), torch.zeros_like(x))
