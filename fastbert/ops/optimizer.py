"""adamw_step and lamb_step: one update of every parameter of a model, in place; total_norm.

Unlike the other ops these act on lists of tensors and have no gradient; so they have no record in
the table of ops, and not every name in ``use_backend`` means something to each of them: "reference"
and "cpp" to adamw_step and total_norm, "reference" and "triton" to adamw_step and lamb_step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastbert.ops import _cpp, _registry
from fastbert.ops._registry import BACKENDS, BackendError

Tensor = torch.Tensor
AllReduce = Callable[[Tensor], None]

# What gradients may be in beside fp32, and copies of fp32 parameters.
_TRITON_NARROW = (torch.bfloat16, torch.float16)
_CPP_NARROW = (torch.bfloat16,)


class Slot(NamedTuple):
    """What one step reads and writes of one parameter: plain tensors of one shape and device.

    param: fp32 or fp64, updated.  grad: any floating dtype, read (and, by torch's fused kernel,
    overwritten with grad / grad_scale).  exp_avg, exp_avg_sq: the moments m and v, in param's
    dtype, updated.  copy: param's value in 16 bits, written, or None.
    step: 0-d fp32, the number of this update, from 1.  lr: a float, or 0-d fp32 on the device.
    weight_decay: a float.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    step: Tensor
    lr: float | Tensor
    weight_decay: float


class Hyper(NamedTuple):
    """The numbers that all slots of a call share.

    bias_correction: whether moments are divided by 1 - beta^step.
    """

    betas: tuple[float, float]
    eps: float
    bias_correction: bool


class Tables:
    """The tables of addresses that the kernels walk, kept from step to step: one an optimiser.

    Making one costs a copy to the device, so it is made anew only when a tensor has moved. Tables
    that a CUDA graph was recorded with are kept for good: replays read them.
    """

    def __init__(self) -> None:
        self._made: dict[Hyper, tuple[Hashable, Any]] = {}
        self._recorded: list[Any] = []

    def of(self, slots: Sequence[Slot], hyper: Hyper) -> Any:
        """The kernels' tables for ``slots``, whose learning rates are tensors.

        Raises RuntimeError while a CUDA graph is recorded for tensors that no step before has seen:
        the copy of the table would be recorded too, and read host memory at every replay.
        """
        from fastbert.kernels import optimizer as kernels  # where Triton is installed

        key = tuple(_identity(slot) for slot in slots)
        recording = slots[0].param.is_cuda and torch.cuda.is_current_stream_capturing()
        known, tables = self._made.get(hyper, (None, None))
        if known != key:
            if recording:
                raise RuntimeError(
                    "the parameters or gradients moved since the last step: take a step before the "
                    "CUDA graph is recorded, and keep gradients where they are with "
                    "zero_grad(set_to_none=False)"
                )
            tables = kernels.tabulate(slots)
            self._made[hyper] = key, tables
        if recording:
            self._recorded.append(tables)
        return tables


def _identity(slot: Slot) -> Hashable:
    *tensors, weight_decay = slot
    addresses = tuple([x.data_ptr() if isinstance(x, Tensor) else 0 for x in tensors])
    return addresses, slot.param.numel(), slot.grad.dtype, weight_decay


def adamw_step(
    slots: Sequence[Slot], hyper: Hyper, tables: Tables, grad_scale: Tensor | None = None
) -> None:
    """AdamW (Loshchilov, Hutter, arXiv 1711.05101, algorithm 2), for each slot:

        g = grad / grad_scale
        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr decay) - lr (m / c1) / (sqrt(v / c2) + eps)

    with c = 1 - beta^step, or c = 1 without bias correction, which is BERT's own optimiser (Devlin
    et al., arXiv 1810.04805, in Google's code).

    grad_scale: fp32 of one element on the device, what gradients are divided by; None for 1.
    Arithmetic in fp32 (fp64 for fp64). On CPU one pass of the C++ kernel serves all slots, where
    torch's writes scaled gradients back and waits behind every tensor. On CUDA, where torch's fused
    kernel lacks something (16-bit gradients of fp32 parameters, copies, no bias correction, a
    grad_scale without a second write), one launch of the Triton kernel does; everywhere else it is
    torch's.
    """
    slots = list(slots)
    if _cpp_serves(slots):
        _cpp.adamw_step(slots, *hyper, grad_scale)
        return
    plain = hyper.bias_correction and grad_scale is None
    if plain and all(s.copy is None and s.grad.dtype == s.param.dtype for s in slots):
        kernel = _kernel_for(slots, only_if_forced=True)
    else:
        kernel = _kernel_for(slots)
    if kernel is None:
        with _contiguous(slots) as whole:
            _adamw_torch(whole, hyper, grad_scale)
        return
    slots = [_with_tensor_lr(slot) for slot in slots]
    kernel.adamw_step(tables.of(slots, hyper), *hyper, grad_scale)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of x^2) over all elements of all ``tensors``, one or more of any floating dtypes.

    0-d, fp32, or fp64 where one of them is. On CPU one pass of the C++ kernel serves them all,
    unless one is fp16: twice as fast as torch's, and the same bits with any number of threads.
    """
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    chosen = _registry._forced in (None, "cpp") and all(x.dtype != torch.float16 for x in tensors)
    if chosen and _cpp_reason(tensors[0].device.type) is None:
        return _cpp.squared_norm(tensors).sqrt().to(wide)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, wide)))


def lamb_step(
    slots: Sequence[Slot],
    hyper: Hyper,
    tables: Tables,
    grad_scale: Tensor | None = None,
    all_reduce: AllReduce | None = None,
) -> None:
    """LAMB (You et al., arXiv 1904.00962, algorithm 2), for each slot, g, m, v, c as in AdamW:

        u = (m / c1) / (sqrt(v / c2) + eps) + decay p
        p = p - lr ratio u,  ratio = |p| / |u|, or 1 where either norm is 0 or decay is 0

    all_reduce: adds up squared norms, in place, over the ranks that hold the other shards of the
    parameters; None where they are whole.
    Deterministic: norms are summed in an order that depends on sizes alone.
    """
    slots = list(slots)
    kernel = _kernel_for(slots)
    if kernel is None:
        with _contiguous(slots) as whole:
            _lamb_torch(whole, hyper, grad_scale, all_reduce)
        return
    slots = [_with_tensor_lr(slot) for slot in slots]
    kernel.lamb_step(tables.of(slots, hyper), *hyper, grad_scale, all_reduce)


def _cpp_serves(slots: Sequence[Slot]) -> bool:
    """Whether the C++ kernel is to serve the slots. Raises BackendError where it is forced and
    cannot."""
    if _registry._forced not in (None, "cpp"):
        return False
    reason = _cpp_reason(slots[0].param.device.type) or _refusal(slots, _CPP_NARROW)
    if _registry._forced == "cpp" and reason is not None:
        raise BackendError(f"optimizer: backend 'cpp' is forced but cannot serve: {reason}")
    return reason is None


def _kernel_for(slots: Sequence[Slot], only_if_forced: bool = False) -> Any:
    """The module of the Triton launchers if they are to serve the slots, else None.

    Raises BackendError where Triton is forced and cannot.
    """
    forced = _registry._forced == "triton"
    device_type = slots[0].param.device.type
    reason = _refusal(slots, _TRITON_NARROW) or _triton_reason(device_type)
    if forced and reason is not None:
        raise BackendError(f"optimizer: backend 'triton' is forced but cannot serve: {reason}")
    # An interpreter is never a choice, only ever asked for.
    chosen = device_type == "cuda" and not only_if_forced and _registry._forced != "reference"
    if reason is not None or not (forced or chosen):
        return None
    from fastbert.kernels import optimizer as kernels

    return kernels


@functools.cache
def _cpp_reason(device_type: str) -> str | None:
    """Why the C++ kernels cannot run there, or None."""
    return BACKENDS["cpp"].reason(device_type)


@functools.cache
def _triton_reason(device_type: str) -> str | None:
    """Why Triton cannot run there, or None; it looks for compilers on disk."""
    return BACKENDS["triton"].reason(device_type)


def _refusal(slots: Sequence[Slot], narrow: tuple[torch.dtype, ...]) -> str | None:
    """Why kernels of these 16-bit dtypes cannot serve the slots; None when they can."""
    for slot in slots:
        param, grad, _, _, copy, *_ = slot
        if param.dtype != torch.float32 or grad.dtype not in (torch.float32, *narrow):
            return f"it takes fp32 parameters, not {param.dtype} with {grad.dtype}"
        if copy is not None and copy.dtype not in narrow:
            return f"it does not copy to {copy.dtype}"
        if not all(x is None or x.is_contiguous() for x in slot[:5]):
            return "it takes contiguous tensors"
    return None


def _with_tensor_lr(slot: Slot) -> Slot:
    if isinstance(slot.lr, Tensor):
        return slot
    return slot._replace(lr=torch.full((), slot.lr, device=slot.param.device))


# --- torch -------------------------------------------------------------------------------------


@contextmanager
def _contiguous(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """The slots in contiguous memory; what had to be copied for that is copied back in the end.

    torch's fused kernel looks at no strides: of a column of a matrix it would update the row.
    """
    whole = [
        Slot._make([x.contiguous() if isinstance(x, Tensor) else x for x in slot]) for slot in slots
    ]
    yield whole
    for slot, copied in zip(slots, whole, strict=True):
        for x, y in zip(slot, copied, strict=True):
            if x is not y and isinstance(x, Tensor) and isinstance(y, Tensor):
                x.copy_(y)


def _adamw_torch(slots: Sequence[Slot], hyper: Hyper, grad_scale: Tensor | None) -> None:
    """Slots of one learning rate and decay at a time; alone where the gradient has to be cast, so
    that there is never more than one such copy."""
    groups: dict[Hashable, list[Slot]] = {}
    for i, slot in enumerate(slots):
        lr = id(slot.lr) if isinstance(slot.lr, Tensor) else slot.lr
        alone = None if slot.grad.dtype == slot.param.dtype else i
        groups.setdefault((slot.param.dtype, lr, slot.weight_decay, alone), []).append(slot)
    for group in groups.values():
        params, _, _, _, copies, _, lrs, decays = zip(*group, strict=True)
        _fused_adamw(params, group, hyper, grad_scale, lrs[0], decays[0])
        for copy, param in zip(copies, params, strict=True):
            if copy is not None:
                copy.copy_(param)


def _fused_adamw(
    params: Any,
    slots: Sequence[Slot],
    hyper: Hyper,
    grad_scale: Tensor | None,
    lr: Any,
    weight_decay: float,
) -> None:
    """torch's fused kernel on ``params``, a list, with the gradients and moments of ``slots``."""
    steps = [slot.step for slot in slots]
    if not hyper.bias_correction:
        # After infinitely many steps 1 - beta^step is exactly 1.
        steps = [torch.full((), math.inf, device=params[0].device)] * len(slots)
    torch._fused_adamw_(
        params,
        [slot.grad.to(slot.param.dtype) for slot in slots],
        [slot.exp_avg for slot in slots],
        [slot.exp_avg_sq for slot in slots],
        [],
        steps,
        lr=lr,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        weight_decay=weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
    )


def _lamb_torch(
    slots: Sequence[Slot], hyper: Hyper, grad_scale: Tensor | None, all_reduce: AllReduce | None
) -> None:
    """Tensor by tensor, so that an update is still in the cache when its norm is taken."""
    scratch = torch.empty_like(max((slot.param for slot in slots), key=Tensor.numel)).flatten()
    for slot in slots:
        p, decay = slot.param, slot.weight_decay
        # From decay p, at a learning rate of -1 and without decay, AdamW arrives at u.
        u = scratch[: p.numel()].to(p.dtype).view(p.shape)
        torch.mul(p, decay, out=u)
        _fused_adamw([u], [slot], hyper, grad_scale, -1.0, 0.0)
        rate = slot.lr
        if decay:
            norms = torch.stack([torch.linalg.vector_norm(x) for x in (p, u)])
            if all_reduce is not None:
                all_reduce(norms.square_())
                norms.sqrt_()
            p_norm, u_norm = norms
            rate = rate * torch.where((p_norm != 0) & (u_norm != 0), p_norm / u_norm, 1.0)
        p.addcmul_(u, torch.as_tensor(rate, dtype=p.dtype, device=p.device), value=-1.0)
        if slot.copy is not None:
            slot.copy.copy_(p)
