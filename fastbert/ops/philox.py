"""The dropout mask as a pure function of (seed, offset, position): Philox4x32-10 in torch.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Every
backend
computes these same bits, so a mask is never stored: backward regenerates it, and the parity tests
run with dropout on.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _mul_hi_lo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``a * m`` for 32-bit values held in int64 (which would overflow)."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def words(
    seed: torch.Tensor, offset: int, plane: torch.Tensor, row: torch.Tensor, col: torch.Tensor
) -> torch.Tensor:
    """uint32 words, held in int64, at broadcast positions (plane, row, col).

    key = (low, high 32 bits of seed), counter = (col // 4, row, offset, plane), word col % 4.
    """
    plane, row, col = torch.broadcast_tensors(plane, row, col)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1, c2, c3 = col // 4, row, torch.full_like(col, offset), plane
    for _ in range(_ROUNDS):
        high0, low0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        high1, low1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3)).gather(0, (col % 4)[None])[0]


def keep_mask(
    seed: torch.Tensor,
    offset: int,
    p: float,
    plane: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
) -> torch.Tensor:
    """True where the element is kept: its word is at least floor(p * 2**32)."""
    return words(seed, offset, plane, row, col) >= int(p * 2.0**32)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor | None, offset: int) -> torch.Tensor:
    """Hidden dropout of (T, H): kept values over 1 - p (row = token, col = channel, plane 0)."""
    if p == 0.0:
        return x
    assert seed is not None
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    col = torch.arange(x.shape[1], device=x.device)[None, :]
    keep = keep_mask(seed, offset, p, torch.zeros_like(row), row, col)
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))
