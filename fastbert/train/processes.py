"""The processes and devices of a run: those of Hugging Face accelerate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fastbert.train.parameters import local


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


def prepare(accelerator: Any, model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """(model, optimizer) as the accelerator's processes and precision have them: the model under
    DDP, or sharded in place by FSDP2, parameters of the optimizer with it.

    The optimizer has no state yet. Raises ValueError for another way of sharing work out.
    """
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") and not accelerator.is_fsdp2:
        raise ValueError(
            f"accelerate: got {kind.replace('FSDP', 'FSDP version 1')}, expected DDP or FSDP2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    wrapped, stepping = accelerator.prepare(model, optimizer)
    return wrapped, stepping


def summed(accelerator: Any, values: list[int]) -> list[int]:
    """Each number, added up over the ranks."""
    if accelerator.num_processes == 1:
        return values
    x = torch.tensor(values, dtype=torch.int64, device=accelerator.device)
    dist.all_reduce(x)
    return x.tolist()


def broken(accelerator: Any, model: nn.Module) -> bool:
    """Whether a parameter of some rank is no finite number: the last step may have had a good loss
    and a gradient that overflowed."""
    finite = all(bool(local(p).isfinite().all()) for p in model.parameters())
    return bool(summed(accelerator, [int(not finite)])[0])


def mean(accelerator: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    """0-d: each rank's sum of its 0-d ``parts``, and of these the mean over the ranks."""
    x = torch.stack(parts).sum()
    if accelerator.num_processes == 1:
        return x
    dist.all_reduce(x)
    return x / accelerator.num_processes
