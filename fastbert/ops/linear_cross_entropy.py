"""linear_cross_entropy: a tied decoder and its loss, without the (M, V) logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import _check
from fastbert.ops._library import _LIBRARY, define, wants_grad
from fastbert.ops._matmul import add_mm_, autocast_to, mm, mm_t
from fastbert.ops._registry import OPS

_OP = OPS["cross_entropy_rows"]
# Logits of one chunk of rows at a time. On a CPU 32 MiB stay in its L3, and a chunk of 256 rows or
# more (V = 30522, fp32) is tall enough for the matrix units. On a GPU each further chunk costs
# 280 MB of memory traffic, to add its product to the fp32 sum of the weight's gradient: 65 us at
# 4.3 TB/s, where the product of 32 MiB of bf16 logits takes 33 us at 790 TFLOP/s. 640 MiB hold the
# labelled rows of a batch of 64k tokens.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 640 * 2**20}
# Rows of logits lie a multiple of so many elements apart. BERT's 30522 are no multiple of 16 bytes:
# rows that lie so send BLAS to its slow kernels on a GPU, and the loss to narrow accesses.
_ROW_MULTIPLE = {"cpu": 1, "cuda": 64}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Softmax cross entropy of u = hidden weight^T + bias: loss_m = logsumexp(u_m) - u_m[labels_m].

    hidden: (M, H).  weight: (V, H), hidden's dtype (under autocast any).  bias: (V,), that dtype or
    fp32.  labels: (M,) int64; rows with ``ignore_index`` count for nothing.
    reduction: "mean" over the rows that count (nan when none does, as torch), or "sum".
    Returns a 0-d loss in fp32 (fp64 for fp64).
    Rows go in chunks; each chunk's logits become their own gradient in place, so the gradients of
    hidden, weight and bias are complete when forward ends (the idea of Liger and of Wijmans et al.,
    arXiv 2411.09009) and backward only scales them by the incoming gradient. In fp16 the mean's
    1 / count waits for backward too: a GradScaler's factor comes only then, and a probability
    divided by the count before it would be lost below fp16's 6e-8.
    Raises ValueError for bad shapes or dtypes and, on CPU, for a label outside 0 .. V - 1.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    hidden, weight = autocast_to(hidden, weight)
    _check.activation("hidden", hidden, ("M", "H"))
    _check.like("weight", weight, hidden, (weight.shape[0], hidden.shape[1]))
    _check.vector("bias", bias, hidden, weight.shape[0])
    _check.ids("labels", labels, hidden.shape[0], hidden.device)
    labels = labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    mean = reduction == "mean"
    if torch.compiler.is_compiling():
        return _compiled(hidden, weight, bias, labels, ignore_index, mean)[0]
    if torch.is_grad_enabled() and wants_grad(hidden, weight, bias):
        return _Eager.apply(hidden, weight, bias, labels, ignore_index, mean)[0]
    return _forward(hidden, weight, bias, labels, ignore_index, mean, (False, False, False))[0]


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    mean: bool,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dhidden, dweight, dbias; a gradient that is not ``wanted`` is empty.

    In fp16 the gradients are those of the sum (see ``_unit``).
    """
    rows, classes = hidden.shape[0], weight.shape[0]
    launch = _OP.launcher("fwd", hidden, classes)
    statistic = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=statistic, device=hidden.device)
    one = torch.ones(1, dtype=statistic, device=hidden.device)
    scale = one / (labels != ignore_index).sum() if mean else one
    grad_scale = one if hidden.dtype == torch.float16 else scale
    kind = "cuda" if hidden.is_cuda else "cpu"
    padded = -(-classes // _ROW_MULTIPLE[kind]) * _ROW_MULTIPLE[kind]
    step = max(1, _CHUNK_BYTES[kind] // max(1, padded * hidden.element_size()))
    dhidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    # Chunks add up in fp32: a bf16 sum would lose a bit with every chunk.
    sum_dtype = hidden.dtype if rows <= step else statistic
    dweight = torch.zeros_like(weight, dtype=sum_dtype) if wanted[1] else hidden.new_empty(0)
    dbias = scale.new_zeros(classes) if wanted[2] else scale.new_empty(0)
    logits = hidden.new_empty(min(step, rows), padded)[:, :classes]
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chunk = mm_t(hidden[part], weight, out=logits[: part.stop - start])
        losses[part] = launch(
            chunk, bias, labels[part], ignore_index, grad_scale if any(wanted) else None
        )
        if wanted[0]:
            mm(chunk, weight, out=dhidden[part])
        if wanted[1]:
            add_mm_(dweight, chunk.t(), hidden[part])
        if wanted[2]:
            dbias += chunk.sum(0, dtype=statistic)
    loss = losses.sum() * scale[0]
    return loss, dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _unit(hidden: torch.Tensor, labels: torch.Tensor, ignore_index: int, mean: bool) -> Any:
    """What ``_forward``'s gradients still have to be multiplied by: 1, or 1 / count in fp16."""
    if hidden.dtype != torch.float16 or not mean:
        return None
    return 1.0 / (labels != ignore_index).sum().clamp(min=1)


def _scaled(grad: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """``grad`` times the incoming gradient."""
    # The usual loss.backward() brings exactly 1; on CPU looking at it is free and saves a pass over
    # the (V, H) gradient. On a GPU looking would wait for the device.
    if dloss.device.type == "cpu" and dloss.item() == 1.0:
        return grad
    return _times(grad, dloss)


def _times(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if grad.dtype == torch.float16:
        return grad.float().mul_(factor).half()  # a GradScaler's factor may be past 65504
    return grad * factor.to(grad.dtype)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        hidden, weight, bias, labels, ignore_index, mean = inputs
        wanted = ctx.needs_input_grad[:3]
        loss, *grads = _forward(hidden, weight, bias, labels, ignore_index, mean, wanted)
        ctx.save_for_backward(*grads)
        ctx.unit = _unit(hidden, labels, ignore_index, mean)
        return (loss,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        dloss = dloss if ctx.unit is None else dloss * ctx.unit
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        grads = (_scaled(grad, dloss) if want else None for grad, want in wanted)
        return *grads, None, None, None


def _library_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = (True, True, bias is not None)
    return _forward(hidden, weight, bias, labels, ignore_index, mean, wanted)


def _library_fake(hidden: Any, weight: Any, bias: Any, labels: Any, ignore: int, mean: bool) -> Any:
    statistic = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dbias = hidden.new_empty(0, dtype=statistic) if bias is None else torch.empty_like(bias)
    loss = hidden.new_empty((), dtype=statistic)
    return loss, torch.empty_like(hidden), torch.empty_like(weight), dbias


def _library_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, _, bias, labels, ignore_index, mean = inputs
    ctx.has_bias = bias is not None
    ctx.unit = _unit(hidden, labels, ignore_index, mean)
    ctx.save_for_backward(*output[1:])


def _library_gradients(ctx: Any, dloss: torch.Tensor, *ignored: Any) -> Any:
    dloss = dloss if ctx.unit is None else dloss * ctx.unit
    dhidden, dweight, dbias = (_times(grad, dloss) for grad in ctx.saved_tensors)
    return dhidden, dweight, dbias if ctx.has_bias else None, None, None, None


_compiled = define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _library_forward,
    _library_fake,
)
torch.library.register_autograd(
    "fastbert::linear_cross_entropy",
    _library_gradients,
    setup_context=_library_save,
    lib=_LIBRARY,
)
