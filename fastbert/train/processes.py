"""The processes and devices of a run: those of Hugging Face accelerate."""

from __future__ import annotations

from typing import Any


def accelerator(precision: str) -> Any:
    """An Accelerator for this process, under ``accelerate launch`` or torchrun one of several.

    precision: "no", "bf16" or "fp16". Raises ModuleNotFoundError without accelerate.
    """
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "training needs accelerate, which is not installed: pip install 'fastbert[train]'"
        ) from None
    return Accelerator(mixed_precision=precision)
