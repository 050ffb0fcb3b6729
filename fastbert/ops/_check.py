"""The ops' argument checks: an error names the argument, what came and what was expected."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(x: object) -> str:
    """A tensor as ``float32 (3, 4) on cpu``; anything else by its type."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
    return type(x).__name__


def activation(name: str, x: torch.Tensor, shape: tuple[int | str, ...]) -> None:
    """``x`` is a floating tensor of ``shape``, in which strings stand for any size."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise ValueError(f"{name}: got {describe(x)}, expected a floating-point tensor")
    have = x.shape
    fits = len(have) == len(shape)
    # Written out: a generator here costs a forward pass of a small batch one percent.
    for size, want in zip(have, shape, strict=False):
        if size != want and not isinstance(want, str):
            fits = False
    if not fits:
        raise ValueError(
            f"{name}: got {describe(x)}, expected shape ({', '.join(map(str, shape))})"
        )


def like(name: str, x: torch.Tensor | None, other: torch.Tensor, shape: tuple[int, ...]) -> None:
    """``x`` (or None) has ``shape`` and stands on the device and in the dtype of ``other``."""
    if x is None:
        return
    activation(name, x, shape)
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: got {describe(x)}, expected {str(other.dtype).removeprefix('torch.')} "
            f"on {other.device}"
        )


def vector(name: str, v: torch.Tensor | None, x: torch.Tensor, size: int) -> None:
    """``v`` (or None) is a parameter of ``size`` elements in the dtype of ``x`` or in fp32."""
    if v is None:
        return
    if not isinstance(v, torch.Tensor) or v.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{name}: got {describe(v)}, expected {str(x.dtype).removeprefix('torch.')} or float32"
        )
    if v.shape != (size,) or v.device != x.device:
        raise ValueError(f"{name}: got {describe(v)}, expected shape ({size},) on {x.device}")


def fp32(name: str, v: torch.Tensor | None, size: int, device: torch.device) -> None:
    """``v`` (or None) is an fp32 vector of ``size`` elements on ``device``."""
    if v is None:
        return
    fits = isinstance(v, torch.Tensor) and v.dtype == torch.float32 and v.shape == (size,)
    if not fits or v.device != device:
        expected = f"float32 of shape ({size},) on {device}"
        raise ValueError(f"{name}: got {describe(v)}, expected {expected}")


def ids(name: str, x: torch.Tensor, length: int | str, device: torch.device) -> None:
    """``x`` is an int64 vector of ``length`` on ``device``."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int64:
        raise ValueError(f"{name}: got {describe(x)}, expected int64 of shape ({length},)")
    if x.dim() != 1 or (isinstance(length, int) and x.shape[0] != length) or x.device != device:
        raise ValueError(f"{name}: got {describe(x)}, expected int64 ({length},) on {device}")


def dropout(p: float, seed: torch.Tensor | None, x: torch.Tensor) -> None:
    """``p`` lies in [0, 1), and a seed is there when it is not 0."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: got {p}, expected 0 <= dropout_p < 1")
    if p == 0.0:
        return
    if seed is None:
        raise ValueError("dropout_seed: got None, expected an int64 tensor of one element")
    fits = isinstance(seed, torch.Tensor) and seed.dtype == torch.int64 and seed.numel() == 1
    if not fits or seed.device != x.device:
        raise ValueError(
            f"dropout_seed: got {describe(seed)}, expected int64 of one element on {x.device}"
        )


def offsets(cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int, device: torch.device) -> None:
    """``cu_seqlens`` runs from 0 to ``tokens`` without descending; checked in full on CPU only.

    On a GPU the values are trusted: reading them would wait for the device. ``PackedBatch`` has
    checked them on the host when it was made.
    """
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens: got {describe(cu_seqlens)}, expected int32 of shape (B + 1,)"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: got {describe(cu_seqlens)}, expected (B + 1,) on {device}")
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen: got {max_seqlen!r}, expected an int >= 0")
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"cu_seqlens: runs from {values[0]} to {values[-1]}, expected 0 to {tokens} tokens"
        )
    longest = 0
    for i in range(len(values) - 1):
        length = values[i + 1] - values[i]
        if length < 0:
            raise ValueError(f"cu_seqlens: descends at {i}: {values[i]} to {values[i + 1]}")
        longest = max(longest, length)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least {longest}")


def in_range(name: str, x: torch.Tensor, bound: int, ignore: int | None = None) -> None:
    """On CPU: every element of ``x`` that is not ``ignore`` lies in 0 .. bound - 1."""
    if x.device.type != "cpu":
        return
    outside = ((x < 0) | (x >= bound)) & (x != ignore if ignore is not None else True)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(f"{name}: got {int(x[i])} at {i}, expected 0 .. {bound - 1}")


def ascending(name: str, x: torch.Tensor, bound: int) -> None:
    """On CPU: ``x`` strictly ascends inside 0 .. bound - 1."""
    in_range(name, x, bound)
    if x.device.type == "cpu" and (x[1:] <= x[:-1]).any():
        i = int((x[1:] <= x[:-1]).nonzero()[0])
        raise ValueError(f"{name}: does not ascend at {i}: {int(x[i])} to {int(x[i + 1])}")
