"""AdamW and LAMB, as torch optimisers on fastbert's fused steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from fastbert.ops.optimizer import Hyper, Slot, Tables, adamw_step, lamb_step
from fastbert.train.parameters import all_reduce_of, grad_norm, grad_scale, local

Tensor = torch.Tensor


class _MultiTensor(Optimizer):
    """What AdamW and LAMB share: all but the equation of the step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        max_grad_norm: float | None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}: got {value}, expected at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers with 0 <= beta < 1")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}, expected more than 0, or None")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._tables = Tables()
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and a group's "lr_scale" multiplies the optimiser's own learning rate."""
        if "lr" not in param_group:
            param_group["lr"] = self.defaults["lr"] * param_group.get("lr_scale", 1.0)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"params: got a parameter of {p.dtype}, expected floating ones")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` does, if given.

        Nothing waits for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, slots = self._slots()
        if not params:
            return loss
        all_reduce = all_reduce_of(params)
        scale = None
        if self.max_grad_norm is not None:
            grads = [slot.grad for part in slots.values() for slot in part]
            norm = grad_norm(grads, all_reduce)
            scale = grad_scale(norm, self.max_grad_norm)
            if self.grad_norm is None:
                self.grad_norm = torch.empty_like(norm)
            self.grad_norm.copy_(norm)  # one tensor, whichever recorded graph writes it
        torch._foreach_add_([slot.step for part in slots.values() for slot in part], 1.0)
        for hyper, part in slots.items():
            self._update(part, hyper, scale, all_reduce)
        return loss

    @abstractmethod
    def _update(
        self, slots: list[Slot], hyper: Hyper, scale: Tensor | None, reduce: Any
    ) -> None: ...

    def _slots(self) -> tuple[list[Tensor], dict[Hyper, list[Slot]]]:
        """The parameters that have a gradient, and their slots by the numbers that they share."""
        params: list[Tensor] = []
        slots: dict[Hyper, list[Slot]] = {}
        for group in self.param_groups:
            hyper = Hyper(tuple(group["betas"]), group["eps"], group["bias_correction"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("params: got a sparse gradient, expected dense ones")
                state = self.state[p]
                if not state:
                    if p.is_cuda and torch.cuda.is_current_stream_capturing():
                        raise RuntimeError(
                            "the optimiser has no state yet: take a step before the CUDA graph is "
                            "recorded, or every replay would begin from none"
                        )
                    _initialise(state, p)
                if p.is_cuda:
                    # Kernels read it through a pointer: a recorded graph sees what schedules write.
                    group["lr"] = _on_device(group["lr"], p.device)
                master = state.get("master_param")
                params.append(p)
                slots.setdefault(hyper, []).append(
                    Slot(
                        local(p if master is None else master),
                        local(p.grad),
                        local(state["exp_avg"]),
                        local(state["exp_avg_sq"]),
                        None if master is None else local(p),
                        state["step"],
                        group["lr"],
                        group["weight_decay"],
                    )
                )
        return params, slots

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments and master values of 16-bit parameters stay fp32, and
        learning rates on a GPU stay the tensors that a recorded graph reads.

        A state_dict of torch.optim.AdamW will do: what it does not say is as by default. The state
        is made of new tensors: load before a CUDA graph is recorded.
        """
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(float(group["lr"]))
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name == "step" or _is_narrow(p):
                    value = torch.as_tensor(value).to(p.device, torch.float32, copy=True)
                    self.state[p][name] = value
            if _is_narrow(p) and index in state_dict["state"]:
                self.state[p].setdefault("master_param", p.detach().float())


def _on_device(rate: float | Tensor, device: torch.device) -> Tensor:
    """``rate`` as a 0-d fp32 tensor; a number gets there by a kernel, which nobody waits for, and
    not by a copy from pageable memory, which waits and ends the recording of a CUDA graph."""
    if isinstance(rate, Tensor):
        return rate.to(device, torch.float32)
    return torch.full((), rate, dtype=torch.float32, device=device)


def _is_narrow(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


def _initialise(state: dict[str, Any], p: Tensor) -> None:
    dtype = torch.float32 if _is_narrow(p) else p.dtype
    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
    state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
    if _is_narrow(p):
        state["master_param"] = p.detach().float()


class AdamW(_MultiTensor):
    """Adam with decoupled weight decay, as ``fastbert.ops.optimizer.adamw_step`` writes it down.

    lr, betas, eps, weight_decay: the defaults of groups; lr may be changed by any torch scheduler.
    bias_correction: False for BERT's own optimiser (Devlin et al., arXiv 1810.04805).
    max_grad_norm: clip the norm of all gradients as one vector, inside the step. ``grad_norm`` then
        holds the norm before clipping (0-d, on the device, until the next step), and ``p.grad`` may
        or may not be clipped when the step returns.

    16-bit parameters keep an fp32 master value in their state and follow it rounded, whatever else
    is written to them; moments are fp32 then. ``state_dict`` has torch's layout: what
    torch.optim.AdamW saved loads here, and back.
    On CPU a C++ kernel updates all parameters in one pass, as fast as memory is; clipping inside it
    saves a pass over the gradients. On CUDA the step is torch's fused AdamW where that has all that
    is asked for, and a Triton kernel's elsewhere. Parameters sharded by FSDP2 are updated shard by
    shard.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, max_grad_norm)

    def _update(self, slots: list[Slot], hyper: Hyper, scale: Tensor | None, reduce: Any) -> None:
        adamw_step(slots, hyper, self._tables, scale)


class Lamb(_MultiTensor):
    """LAMB (You et al., arXiv 1904.00962, algorithm 2), as ``fastbert.ops.optimizer.lamb_step``.

    Arguments, state and attributes as AdamW's. A parameter of a group without weight decay, that is
    LayerNorms and biases under ``param_groups``, takes the plain Adam step. The norms of parameters
    sharded by FSDP2 are those of the whole parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, max_grad_norm)

    def _update(self, slots: list[Slot], hyper: Hyper, scale: Tensor | None, reduce: Any) -> None:
        lamb_step(slots, hyper, self._tables, scale, reduce)
