"""One record an op and case: inputs, our call, the peers' calls, and what must be moved and done.

Shapes are BERT-base's (H 768, I 3072, 12 heads of 64) unless a case says otherwise. ``bytes``
counts each input read once and each output written once, ``flops`` the multiplications and
additions of the
mathematics: the floor that a figure is held against, not what a kernel happens to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from optimizers import optimizer_step

from fastbert import ops
from fastbert.packed import PackedBatch

Run = Callable[[], Any]
Tensor = torch.Tensor


@dataclass
class Problem:
    """ours and peers: name -> call. check: largest error of ours against fp64, over torch's own."""

    ours: Run
    peers: dict[str, Run]
    bytes: int
    flops: int
    check: Callable[[], float] = field(repr=False)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[str, torch.dtype], Problem] = field(repr=False)


def lengths_of(kind: str, sequences: int, longest: int) -> list[int]:
    """Sequence lengths: "dense" all ``longest``; "ragged" evenly spaced from 8 to ``longest``, in a
    fixed shuffled order.

    Spaced, not drawn: what padding costs a peer is longest / mean, and the mean of 32 draws may lie
    a sixth off that of the distribution.
    """
    if kind == "dense":
        return [longest] * sequences
    spaced = torch.linspace(8, longest, sequences).round().long()
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    return spaced[order].tolist()


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _ratio(ours: list[Tensor], peer: list[Tensor], exact: list[Tensor]) -> float:
    """Worst err(ours) / (2 err(torch) + tiny) over the tensors; at most 1 passes."""
    floor = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    worst = 0.0
    for o, p, e in zip(ours, peer, exact, strict=True):
        worst = max(worst, _error(o, e) / (2 * _error(p, e) + floor[o.dtype]))
    return worst


def _grads(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def _leaf(*shape: int, where: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=where).to(dtype).requires_grad_()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _pointwise(
    ours: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: list[Tensor],
    traffic: tuple[int, int],
    backward: bool,
) -> Problem:
    """A memory-bound op: traffic = activations moved in forward and in backward, in elements."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn_like(inputs[0])
    compiled = _compiled(peer)

    def step(function: Callable[..., Tensor]) -> Run:
        if backward:
            return lambda: torch.autograd.grad(function(*inputs), inputs, dy)
        return torch.no_grad()(lambda: function(*inputs))

    def check() -> float:
        exact = _grads(peer(*exact_inputs), dy.double(), exact_inputs)
        return _ratio(_grads(ours(*inputs), dy, inputs), _grads(peer(*inputs), dy, inputs), exact)

    moved = sum(traffic) if backward else traffic[0]
    return Problem(
        step(ours),
        {"torch eager": step(peer), "torch.compile": step(compiled)},
        moved * inputs[0].numel() * inputs[0].element_size(),
        0,
        check,
    )


def _bias_gelu(tokens: int, backward: bool) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x, bias = (_leaf(*s, where=where, dtype=dtype) for s in ((tokens, 3072), (3072,)))
        return _pointwise(
            ops.bias_gelu, lambda x, b: F.gelu(x + b), [x, bias], (2, 3), backward
        )  # fmt: skip

    return make


def _add_layer_norm(tokens: int, backward: bool) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        shapes = ((tokens, 768), (tokens, 768), (768,), (768,), (768,))
        inputs = [_leaf(*s, where=where, dtype=dtype) for s in shapes]

        def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return ops.add_layer_norm(x, r, w, b, x_bias=xb)

        def peer(x: Tensor, r: Tensor, w: Tensor, b: Tensor, xb: Tensor) -> Tensor:
            return F.layer_norm(r + (x + xb), (768,), w, b, 1e-12)

        return _pointwise(ours, peer, inputs, (4 if backward else 3, 3), backward)

    return make


def _attention(
    kind: str, sequences: int, longest: int, backward: bool, dropout: float = 0.0
) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        heads, dim = 12, 64
        lengths = lengths_of(kind, sequences, longest)
        ids = torch.zeros(sum(lengths), dtype=torch.int64, device=where)
        batch = PackedBatch.from_flat(ids, lengths)
        qkv = _leaf(sum(lengths), 3, heads, dim, where=where, dtype=dtype)
        dout = torch.randn(sum(lengths), heads, dim, device=where).to(dtype)
        seed = torch.randint(2**62, (1,), device=where)
        padded = batch.unpack(qkv.detach().flatten(1))
        padded = padded.view(len(lengths), batch.max_seqlen, 3, heads, dim)
        q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in padded.unbind(2))
        dpadded = batch.unpack(dout.flatten(1)).view(len(lengths), -1, heads, dim).transpose(1, 2)
        mask = None
        if kind == "ragged":
            real = torch.ones(sum(lengths), 1, device=where)
            mask = batch.unpack(real).bool().squeeze(-1)[:, None, None, :]

        def ours() -> Tensor:
            return ops.attention(
                qkv, batch.cu_seqlens, batch.max_seqlen,
                dropout_p=dropout, dropout_seed=seed if dropout else None,
            )[0]  # fmt: skip

        def sdpa() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

        def step(forward: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> Run:
            if backward:
                return lambda: torch.autograd.grad(forward(), inputs, dy)
            return torch.no_grad()(forward)

        def check() -> float:
            few = batch.lengths[:2]
            part = qkv[: sum(few)].detach().requires_grad_()
            small = PackedBatch.from_flat(ids[: sum(few)], few)
            oracle = part.detach().double().requires_grad_()

            def plain(x: Tensor) -> Tensor:
                pieces = []
                for one in x.split(list(few)):
                    a, b, c = one.permute(1, 2, 0, 3)
                    p = ((a @ b.mT).float() if x.dtype != torch.float64 else a @ b.mT) * dim**-0.5
                    pieces.append((p.softmax(-1).to(x.dtype) @ c).transpose(0, 1))
                return torch.cat(pieces)

            dy = dout[: sum(few)]
            mine, _ = ops.attention(part, small.cu_seqlens, small.max_seqlen)
            return _ratio(
                _grads(mine, dy, [part]),
                _grads(plain(part), dy, [part]),
                _grads(plain(oracle), dy.double(), [oracle]),
            )

        products = 2 + (5 if backward else 0)
        return Problem(
            step(ours, [qkv], dout),
            {"torch SDPA": step(sdpa, [q, k, v], dpadded)},
            (4 + (8 if backward else 0)) * sum(lengths) * heads * dim * qkv.element_size(),
            products * 2 * heads * dim * sum(n * n for n in lengths),
            check,
        )

    return make


def _embed(tokens: int, backward: bool) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        shapes = ((30522, 768), (512, 768), (2, 768), (768,), (768,))
        tables = [_leaf(*s, where=where, dtype=dtype) for s in shapes]
        ids = torch.randint(30522, (tokens,), device=where)
        places = torch.arange(tokens, device=where) % 128
        types = torch.randint(2, (tokens,), device=where)
        dy = torch.randn(tokens, 768, device=where).to(dtype)

        def ours(*t: Tensor) -> Tensor:
            return ops.embed_layer_norm(ids, places, types, *t)

        def peer(word: Tensor, position: Tensor, kind: Tensor, w: Tensor, b: Tensor) -> Tensor:
            e = F.embedding(ids, word) + F.embedding(places, position) + F.embedding(types, kind)
            return F.layer_norm(e, (768,), w, b, 1e-12)

        def step(function: Callable[..., Tensor]) -> Run:
            if backward:
                return lambda: torch.autograd.grad(function(*tables), tables, dy)
            return torch.no_grad()(lambda: function(*tables))

        def check() -> float:
            exact = [t.detach().double().requires_grad_() for t in tables]
            return _ratio(
                _grads(ours(*tables), dy, tables),
                _grads(peer(*tables), dy, tables),
                _grads(peer(*exact), dy.double(), exact),
            )

        moved = 2 * tokens * 768 + (tokens * 768 + 30522 * 768 if backward else 0)
        return Problem(
            step(ours),
            {"torch eager": step(peer), "torch.compile": step(_compiled(peer))},
            moved * dy.element_size(),
            0,
            check,
        )

    return make


def _head(rows: int) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        hidden = _leaf(rows, 768, where=where, dtype=dtype)
        # BERT's own initialisation. Wider logits have probabilities below 1e-38, and the products
        # with those, ours and torch's, take ten times as long on denormal numbers.
        weight = (0.02 * torch.randn(30522, 768, device=where)).to(dtype).requires_grad_()
        bias = _leaf(30522, where=where, dtype=dtype)
        labels = torch.randint(30522, (rows,), device=where)
        inputs = [hidden, weight, bias]

        def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return ops.linear_cross_entropy(h, w, b, labels)

        def peer(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(
                F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32)), labels
            )

        one = torch.ones((), device=where)

        def step(function: Callable[..., Tensor]) -> Run:
            return lambda: torch.autograd.grad(function(*inputs), inputs)

        def check() -> float:
            exact = [x.detach().double().requires_grad_() for x in inputs]
            return _ratio(
                _grads(ours(*inputs), one, inputs),
                _grads(peer(*inputs), one, inputs),
                _grads(peer(*exact), one.double(), exact),
            )

        return Problem(
            step(ours),
            {"torch eager": step(peer), "torch.compile": step(_compiled(peer))},
            3 * 30522 * 768 * hidden.element_size(),
            6 * rows * 768 * 30522,
            check,
        )

    return make


def _rows(tokens: int) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, 768, device=where).to(dtype)
        index = torch.arange(0, tokens, 2, device=where)
        return Problem(
            torch.no_grad()(lambda: ops.gather_rows(x, index)),
            {"torch index_select": lambda: x.index_select(0, index)},
            x.numel() * x.element_size(),
            0,
            lambda: float(not torch.equal(ops.gather_rows(x, index), x[index])) * 2,
        )

    return make


def _scatter(tokens: int) -> Callable[[str, torch.dtype], Problem]:
    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens // 2, 768, device=where).to(dtype)
        index = torch.arange(0, tokens, 2, device=where)

        def peer() -> Tensor:
            return x.new_zeros(tokens, 768).index_copy_(0, index, x)

        return Problem(
            torch.no_grad()(lambda: ops.scatter_rows(x, index, tokens)),
            {"torch zeros + index_copy": peer},
            3 * x.numel() * x.element_size(),
            0,
            lambda: float(not torch.equal(ops.scatter_rows(x, index, tokens), peer())) * 2,
        )

    return make


def _int8(tokens: int, fused: bool) -> Callable[[str, torch.dtype], Problem]:
    """The up projection of BERT-base; ``fused`` False: only its rows' quantisation."""

    def make(where: str, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, 768, device=where).to(dtype)
        w = (0.02 * torch.randn(3072, 768, device=where)).to(dtype)
        bias = torch.randn(3072, device=where)
        w_scale = w.float().abs().amax(1) / 127
        wq = (w.float() / w_scale[:, None]).round().to(torch.int8)
        column_sum = ops.column_sums(wq, w_scale)

        def rows() -> Tensor:
            return ops.quantize_rows(x)[0]

        def torch_rows() -> Tensor:
            low, high = x.float().aminmax(dim=1, keepdim=True)
            return ((x - (low + high) / 2) * (254 / (high - low))).round().to(torch.int8)

        def ours() -> Tensor:
            q, scale, offset = ops.quantize_rows(x)
            return ops.linear_int8(
                q, scale, wq, w_scale, bias,
                offset=offset, column_sum=column_sum, activation="gelu", dtype=dtype,
            )  # fmt: skip

        def int_mm() -> Tensor:
            q, scale, offset = ops.quantize_rows(x)
            sums = torch._int_mm(q, wq.t()) * scale[:, None] * w_scale
            return F.gelu(sums + offset[:, None] * column_sum + bias).to(dtype)

        def check() -> float:
            exact = x.double() @ w.double().t() + bias.double()
            return _error(ours(), F.gelu(exact)) / 0.03  # of the largest value: int8 is coarse

        if not fused:
            size = x.element_size() + 1
            peers = {"torch eager": torch_rows, "torch.compile": _compiled(torch_rows)}
            return Problem(torch.no_grad()(rows), peers, x.numel() * size, 0, check)
        plain = {
            "torch Linear + GELU": lambda: F.gelu(F.linear(x, w, bias.to(dtype))),
            "torch._int_mm": int_mm,
            "torch._int_mm compiled": _compiled(int_mm),
        }
        moved = (x.numel() + tokens * 3072) * x.element_size() + w.numel()
        return Problem(torch.no_grad()(ours), plain, moved, 2 * tokens * w.numel(), check)

    return make


def _optimizer(kind: str) -> Callable[[str, torch.dtype], Problem]:
    return lambda where, dtype: Problem(*optimizer_step(kind, where, dtype))


def cases(where: str) -> Iterator[Case]:
    """Every case that suits the device: a CPU's few thousand tokens, a GPU's tens of thousands."""
    tokens = 65536 if where == "cuda" else 2048
    for backward in (False, True):
        suffix = "-fwd-bwd" if backward else "-fwd"
        yield Case("bias_gelu", f"base-{tokens}{suffix}", _bias_gelu(tokens, backward))
        yield Case("add_layer_norm", f"base-{tokens}{suffix}", _add_layer_norm(tokens, backward))
        yield Case("embed_layer_norm", f"base-{tokens}{suffix}", _embed(tokens, backward))
        for kind, longest in (("dense", 128), ("dense", 512), ("ragged", 512)):
            count = tokens // longest * (2 if kind == "ragged" else 1)
            make = _attention(kind, count, longest, backward)
            yield Case("attention", f"base-{kind}-{count}x{longest}{suffix}", make)
    count = tokens // 512
    make = _attention("dense", count, 512, True, dropout=0.1)
    yield Case("attention", f"base-dense-{count}x512-fwd-bwd-dropout", make)
    yield Case("linear_cross_entropy", f"base-{tokens * 3 // 20}-rows", _head(tokens * 3 // 20))
    yield Case("gather_rows", f"base-{tokens}-half", _rows(tokens))
    yield Case("scatter_rows", f"base-{tokens}-half", _scatter(tokens))
    if where == "cuda":
        yield Case("quantize_rows", f"base-{tokens}", _int8(tokens, fused=False))
        yield Case("linear_int8", f"base-{tokens}-up-gelu", _int8(tokens, fused=True))
    for kind in ("adamw", "adamw-clip", "lamb"):
        yield Case("optimizer", f"base-{kind}", _optimizer(kind))
