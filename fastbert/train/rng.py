"""The states of every random generator that a training step may draw from, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor

# Words of a Mersenne Twister, of which python and numpy each keep one and a position in it; both
# also hold back every other normal number.
_WORDS = 624


def rng_state() -> dict[str, Tensor]:
    """The states of python's ``random``, of numpy's and torch's global generators and, where CUDA
    is in use, of the current GPU's: names -> tensors of one dimension."""
    _, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    assert numpy["bit_generator"] == "MT19937"
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.append(key.astype(np.int64), position)),
        "numpy_gauss": _optional(numpy["gauss"] if numpy["has_gauss"] else None),
        "torch": torch.get_rng_state(),
    }
    if _cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put the generators where ``rng_state`` found them; "cuda" counts only where CUDA is in use.

    Raises ValueError for a state that is none.
    """
    sizes = {"python": _WORDS + 1, "numpy": _WORDS + 1}
    for name in ("python", "python_gauss", "numpy", "numpy_gauss", "torch"):
        if name not in state or len(state[name]) != sizes.get(name, len(state[name])):
            raise ValueError(f"state: its {name!r} is missing or cut short")
    random.setstate((3, tuple(state["python"].tolist()), _number(state["python_gauss"])))
    gauss = _number(state["numpy_gauss"])
    *key, position = state["numpy"].tolist()
    words = np.array(key, np.uint32)
    np.random.set_state(("MT19937", words, position, int(gauss is not None), gauss or 0.0))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and _cuda_in_use():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(*numbers: int) -> None:
    """Start every generator anew from ``numbers``, such as a seed and a rank."""
    python, numpy, torch_seed = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_seed)  # CUDA's too


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


def _number(x: Tensor) -> float | None:
    return float(x[0]) if len(x) else None
