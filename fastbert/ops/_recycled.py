"""Memory that comes back: large tensors whose pages the next one of their size takes over.

The system hands out large memory page by page, each zeroed and mapped when it is first written: for
a gradient of 30,522 x 384 fp32 (47 MB) that and the zeros took 11 ms an update. In memory that was
such a gradient before it takes 2.5. (glibc keeps freed memory too, but no piece above 32 MB.)
"""

from __future__ import annotations

import ctypes
import weakref

import torch

# Free memory by its size in bytes, at most _KEPT of each: one that is a gradient, and one that is
# added to it where gradients accumulate. Lists and dicts do this without a lock, which a fork could
# leave locked: pop, append and setdefault are atomic.
_spare: dict[int, list[torch.Tensor]] = {}
_KEPT = 2


def recycled_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor of the shape and dtype of ``x``, its elements undefined.

    It has a storage of its own, as any other tensor. The memory is free again when that storage is,
    that is when nobody holds the tensor, a view of it or an alias, in Python or in autograd;
    whatever they wrote is still in it.
    """
    size = x.numel() * x.element_size()
    if size == 0:
        return torch.empty_like(x)
    spare = _spare.setdefault(size, [])
    try:
        memory = spare.pop()
    except IndexError:
        # Not torch.empty: a new page that is read first, as the kernel does, maps to the one page
        # of zeros, and the write that then replaces it interrupts every core (10 us a page).
        memory = torch.zeros(size, dtype=torch.uint8)
    lease = (ctypes.c_char * size).from_address(memory.data_ptr())
    # The storage that frombuffer makes holds the lease, the finaliser holds the memory.
    weakref.finalize(lease, _give_back, spare, memory).atexit = False
    return torch.frombuffer(lease, dtype=x.dtype).view(x.shape)


def _give_back(spare: list[torch.Tensor], memory: torch.Tensor) -> None:
    if len(spare) < _KEPT:
        spare.append(memory)
