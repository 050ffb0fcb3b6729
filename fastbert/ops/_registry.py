"""The one table of ops and backends: who can compute what, and who was chosen.

An *op* is a mathematical contract, a *backend* is one module of launchers that fulfils it.
Dispatch, ``use_backend``, ``explain``, the parity tests, the benches and the README's support
matrix all read ``OPS`` below; nothing else in the package knows which backends exist.

A launcher is named ``<op>_<half>`` (``attention_fwd``, ``attention_bwd``), or ``<op>`` where there
is no backward half; it takes and returns plain tensors and knows nothing of autograd. The same half
has the same signature in every backend.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from fastbert import _native, device

_log = logging.getLogger("fastbert")

_FLOAT32_AND_16 = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(ValueError):
    """A forced backend, or strict mode, met a call that the backend cannot serve."""


@dataclass(frozen=True)
class Backend:
    """One way to compute ops.

    name: what the user writes in ``use_backend`` and ``FASTBERT_BACKEND``.
    dtypes: activation dtypes that its kernels take.
    reason: device type -> None when the backend can run there, else why not, in words.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    reason: Callable[[str], str | None]


def _cpp_reason(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the C++ kernels compute CPU tensors, not {device_type}"
    return _native.cpu_reason()


def _cuda_reason(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"the CUDA kernels compute CUDA tensors, not {device_type}"
    reason = _native.cuda_reason() or device.cuda_reason()
    return reason or _native.cuda_target_reason(device.cuda_capability(0))


def _triton_reason(device_type: str) -> str | None:
    if device_type == "cpu" and device.triton_interpreted():
        return None
    if device_type != "cuda":
        return f"Triton kernels compute CUDA tensors, not {device_type} (unless TRITON_INTERPRET=1)"
    return device.triton_reason()


BACKENDS: dict[str, Backend] = {
    "cpp": Backend("cpp", (torch.float32, torch.bfloat16, torch.float64), _cpp_reason),
    "triton": Backend("triton", _FLOAT32_AND_16, _triton_reason),
    "cuda": Backend("cuda", _FLOAT32_AND_16, _cuda_reason),
    "reference": Backend("reference", (*_FLOAT32_AND_16, torch.float64), lambda device_type: None),
}


@dataclass(frozen=True)
class Op:
    """A record of the table.

    halves: the launchers that a backend of this op has.
    modules: backend name -> module of its launchers, in order of preference on each device. The
        order is a statement about speed; a backend stands first where a bench in
        ``bench/results`` shows it first.
    max_size: backend name -> largest value of the op's size (attention: head_dim; others: row
        width) that its kernels take, where there is a limit.
    no_bias: backends whose kernels take no additive bias, where the op has one.
    since: compute capability from which GPUs run its kernels in every size, None for all.
    size_before: the largest size that earlier ones run, 0 for none.
    """

    name: str
    halves: tuple[str, ...]
    modules: dict[str, str]
    max_size: dict[str, int]
    no_bias: tuple[str, ...]
    since: tuple[int, int] | None
    size_before: int

    def launcher(
        self, half: str, x: torch.Tensor, size: int, bias: bool = False
    ) -> Callable[..., Any]:
        """The function that computes ``half`` for an activation like ``x``, ``bias`` with one."""
        backend = self.choice(x, size, bias)
        function = f"{self.name}_{half}" if "bwd" in self.halves else self.name
        return _launcher(self.modules[backend], function)

    def choice(self, x: torch.Tensor, size: int, bias: bool = False) -> str:
        """The name of the backend that ``launcher`` takes."""
        return _select(self.name, x.device.type, x.dtype, size, bias, _forced, _strict)


def _op(
    name: str,
    *,
    native: str,
    cpp: bool = True,
    cuda: bool = False,
    bwd: bool = True,
    no_bias: tuple[str, ...] = (),
    since: tuple[int, int] | None = None,
    size_before: int = 0,
    **limits: int,
) -> Op:
    modules = {"cpp": "fastbert.ops._cpp"} if cpp else {}
    modules["triton"] = f"fastbert.kernels.{native}"
    if cuda:
        modules["cuda"] = "fastbert.ops._cuda_launch"
    modules["reference"] = "fastbert.ops._reference"
    halves = ("fwd", "bwd") if bwd else ("fwd",)
    return Op(name, halves, modules, limits, no_bias, since, size_before)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _op(
            "attention",
            native="attention",
            cuda=True,
            no_bias=("cpp", "cuda"),
            since=(8, 0),
            size_before=128,
            triton=256,
        ),
        _op("bias_gelu", native="bias_gelu", cuda=True),
        # One product with GELU in its epilogue; ops/feed_forward.py says when it is taken.
        # Before sm_80 Triton's products run without matrix units: BLAS has no rival there.
        _op("feed_forward", native="feed_forward", cpp=False, since=(8, 0)),
        _op("add_layer_norm", native="add_layer_norm", cuda=True, triton=16384),
        _op("embed_layer_norm", native="embed_layer_norm", cuda=True, triton=16384),
        _op("cross_entropy_rows", native="cross_entropy", bwd=False),
        _op("gather_rows", native="rows", bwd=False),
        _op("scatter_rows", native="rows", bwd=False),
        # On CPU int8 belongs to the inference engine, which keeps weights in its own layout.
        _op("quantize_rows", native="linear_int8", cpp=False, bwd=False, triton=16384),
        # Triton compiles no product of int8 for earlier ones.
        _op("linear_int8", native="linear_int8", cpp=False, bwd=False, since=(8, 0)),
        _op(
            "quantize_rows_fp8",
            native="linear_fp8",
            cpp=False,
            bwd=False,
            since=(8, 9),
            triton=16384,
        ),
        _op("linear_fp8", native="linear_fp8", cpp=False, bwd=False, since=(8, 9)),
        _op("add_layer_norm_int8", native="add_layer_norm", cpp=False, bwd=False, triton=16384),
    )
}

_asked = device.setting("FASTBERT_BACKEND")
_forced = None if _asked == "auto" else _asked
_strict = device.setting("FASTBERT_STRICT") == "1"


def _unknown(name: str) -> ValueError:
    return ValueError(f"backend: unknown name {name!r}, expected one of {sorted(BACKENDS)}")


class _Restore(AbstractContextManager[None]):
    """What ``use_backend`` returns: leaving the ``with`` block brings the former choice back."""

    def __init__(self, forced: str | None, strict: bool) -> None:
        self._former = (forced, strict)

    def __exit__(self, *exc: object) -> None:
        global _forced, _strict
        _forced, _strict = self._former


def use_backend(name: str | None = None, *, strict: bool | None = None) -> _Restore:
    """Choose the backend of every op in this process, until changed or the ``with`` block ends.

    name: "cpp", "triton", "cuda" or "reference"; None or "auto" lets each op take its best.
        ``FASTBERT_BACKEND`` sets the first value.
    strict: True makes every fall back to the reference an error (``FASTBERT_STRICT=1``); None keeps
        the present value.

    Raises ValueError for a name that does not exist, and BackendError (a ValueError) at once when
    the backend cannot run on this machine at all.
    """
    global _forced, _strict
    restore = _Restore(_forced, _strict)
    if name in (None, "auto"):
        _forced = None
    elif name in BACKENDS:
        reasons = [BACKENDS[name].reason(kind) for kind in ("cpu", "cuda")]
        if all(reasons):
            raise BackendError(f"backend {name!r} cannot run here: {'; '.join(map(str, reasons))}")
        _forced = name
    else:
        raise _unknown(str(name))
    if strict is not None:
        _strict = strict
    return restore


def refusal(
    op: Op,
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    size: int,
    bias: bool = False,
) -> str | None:
    """Why ``backend`` cannot serve this call of ``op``; None when it can."""
    if backend not in op.modules:
        return f"{op.name} has no {backend} kernel"
    if bias and backend in op.no_bias:
        return f"the {backend} kernel of {op.name} takes no bias"
    record = BACKENDS[backend]
    if dtype not in record.dtypes:
        return f"the {backend} kernels do not take {str(dtype).removeprefix('torch.')}"
    limit = op.max_size.get(backend)
    if limit is not None and size > limit:
        return f"the {backend} kernel of {op.name} takes sizes up to {limit}, not {size}"
    reason = record.reason(device_type)
    if reason is not None or op.since is None or device_type != "cuda" or backend == "reference":
        return reason
    if device.cuda_capability(0) >= op.since or size <= op.size_before:
        return None
    sizes = f" for sizes above {op.size_before}" if op.size_before else ""
    first = "sm_{}{}".format(*op.since)
    return f"the {backend} kernel of {op.name}{sizes} is for {first} and later"


@functools.cache
def _select(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    size: int,
    bias: bool,
    forced: str | None,
    strict: bool,
) -> str:
    op = OPS[name]
    if forced is not None:
        reason = refusal(op, forced, device_type, dtype, size, bias)
        if reason is None:
            return forced
        raise BackendError(f"{name}: backend {forced!r} is forced but cannot serve: {reason}")
    reasons = {}
    for backend in op.modules:
        reason = refusal(op, backend, device_type, dtype, size, bias)
        if reason is None:
            break
        reasons[backend] = reason
    if backend == "reference":
        why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
        if strict:
            raise BackendError(f"{name}: strict mode, and only the reference can serve ({why})")
        # functools.cache makes this once for every kind of call, not once a call.
        _log.warning("%s takes the slow reference for %s on %s: %s", name, dtype, device_type, why)
    return backend


@functools.cache
def _launcher(module: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), function)


def forget_choices() -> None:
    """Drop cached choices: needed after something that a choice depends on has changed."""
    _select.cache_clear()


def choices(
    device_type: str, dtype: torch.dtype, sizes: dict[str, int], *, bias: bool = False
) -> list[dict[str, Any]]:
    """One row an op: the backend that it takes for such a call, and why none of the others.

    sizes: op name -> its size (attention: head_dim; the others: row width).  bias: for calls with
        an additive bias, which attention alone has.
    Rows: {"op", "backend", "passed_over": {backend: reason}}; a forced backend that cannot serve
    gives backend None.
    """
    rows = []
    for name, op in OPS.items():
        size = sizes.get(name, 0)
        reasons = {b: refusal(op, b, device_type, dtype, size, bias) for b in op.modules}
        usable = [b for b, reason in reasons.items() if reason is None]
        if _forced is not None:
            usable = [b for b in usable if b == _forced]
        chosen = usable[0] if usable else None
        passed_over = {}
        for backend, reason in reasons.items():
            if backend == chosen:
                break
            passed_over[backend] = reason or f"{_forced} is forced"
        rows.append({"op": name, "backend": chosen, "passed_over": passed_over})
    return rows
