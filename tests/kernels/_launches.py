"""Every launcher on rows of its own kind, for what must hold of all: at any size, from any address,
every time.

A launch is made for a number of rows and a dropout probability, of which some have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from fastbert.kernels import (
    _attention_config,
    _attention_dropout,
    _config,
    add_layer_norm,
    attention,
    bias_gelu,
    cross_entropy,
    embed_layer_norm,
    feed_forward,
    linear_fp8,
    linear_int8,
    optimizer,
    rows,
)
from fastbert.ops import OPS

from ._parity import BF16, DEVICE, EPS, FP16, INTERPRETED, dropout_args, random

DTYPE = FP16 if INTERPRETED else BF16
WIDTH, HEADS, CLASSES = (48, 2, 100) if INTERPRETED else (3072, 12, 30522)
HEAD_DIM = 64
LENGTHS = (16, 1, 15, 8) if INTERPRETED else (128, 1, 127, 44)  # of the last sequences
ROWS, LONGEST = sum(LENGTHS), max(LENGTHS)


class Launch(NamedTuple):
    """inputs: by name, each with the rows in its first dimension; rows of zeros before the others
        add nothing.
    call: a function of them that changes none. It returns two lists: what depends on one row alone
        (with the rows in the first dimension, if it has as many), and what is summed over many, in
        an order that may depend on their number.
    width: elements a row of the widest tensor.
    """

    inputs: dict[str, torch.Tensor]
    call: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]
    width: int = WIDTH


def _bias_gelu(n, p):
    bias = random(WIDTH)

    def call(x, dy):
        dx, dbias = bias_gelu.bias_gelu_bwd(dy, x, bias, False)
        return [bias_gelu.bias_gelu_fwd(x, bias, False), dx], [dbias]

    return Launch({name: random(n, WIDTH, dtype=DTYPE) for name in ("x", "dy")}, call)


def _add_layer_norm(n, p):
    weight, bias, x_bias = random(WIDTH), random(WIDTH), random(WIDTH)
    dropout = dropout_args(p)

    def call(x, residual, dy):
        y, z, mean, rstd = add_layer_norm.add_layer_norm_fwd(
            x, residual, x_bias, weight, bias, EPS, *dropout, True
        )
        dz, dx, *sums = add_layer_norm.add_layer_norm_bwd(dy, z, weight, mean, rstd, *dropout, True)
        return [y, z, mean, rstd, dz, dx], sums

    return Launch({name: random(n, WIDTH, dtype=DTYPE) for name in ("x", "residual", "dy")}, call)


def _add_layer_norm_int8(n, p):
    weight, bias, x_bias, multiplier = (random(WIDTH) for _ in range(4))

    def call(x, residual):
        outputs = add_layer_norm.add_layer_norm_int8(
            x, residual, x_bias, weight, bias, multiplier, EPS
        )
        return list(outputs), []

    return Launch({name: random(n, WIDTH, dtype=DTYPE) for name in ("x", "residual")}, call)


def _embed_layer_norm(n, p):
    tables = random(50, WIDTH, dtype=DTYPE), random(8, WIDTH, dtype=DTYPE), None
    weight, bias, dropout = random(WIDTH), random(WIDTH), dropout_args(p)

    def call(ids, positions, dy):
        y, mean, rstd = embed_layer_norm.embed_layer_norm_fwd(
            ids, positions, None, *tables, weight, bias, EPS, *dropout
        )
        dword, dposition, _, dweight, dbias = embed_layer_norm.embed_layer_norm_bwd(
            dy, ids, positions, None, *tables, weight, mean, rstd, *dropout
        )
        return [y, mean, rstd], [dword, dposition, dweight, dbias]

    ids, positions = (torch.randint(bound, (n,), device=DEVICE) for bound in (50, 8))
    dy = random(n, WIDTH, dtype=DTYPE)
    return Launch({"ids": ids, "positions": positions, "dy": dy}, call)


def _cross_entropy_rows(n, p):
    bias, scale = random(CLASSES), random(1)

    def call(logits, labels):
        logits = logits.clone()
        loss = cross_entropy.cross_entropy_rows(logits[:, :CLASSES], bias, labels, -100, scale)
        return [loss, logits], []

    padded = -(-CLASSES // 64) * 64
    labels = torch.randint(CLASSES, (n,), device=DEVICE)
    return Launch({"logits": random(n, padded, dtype=DTYPE), "labels": labels}, call, padded)


def _rows(n, p):
    def call(x):
        index = torch.arange(len(x), device=DEVICE)
        last = index[-ROWS:]
        picked = rows.gather_rows(x, last)
        spread = rows.scatter_rows(picked, last, len(x))
        return [rows.gather_rows(x, index), picked, spread], []

    return Launch({"x": random(n, WIDTH, dtype=DTYPE)}, call)


def _linear_int8(n, p):
    weight = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8, device=DEVICE)
    weight_scale, bias, column_sum = random(WIDTH), random(WIDTH), random(WIDTH)

    def call(x):
        q, scale, offset = linear_int8.quantize_rows(x)
        arguments = (weight, weight_scale, bias, offset, column_sum, 1, DTYPE)
        return [q, scale, offset, linear_int8.linear_int8(q, scale, *arguments)], []

    return Launch({"x": random(n, WIDTH, dtype=DTYPE)}, call)


def _linear_fp8(n, p):
    weight = random(WIDTH, WIDTH).to(torch.float8_e4m3fn)
    weight_scale, bias = random(WIDTH), random(WIDTH)

    def call(x):
        q, scale = linear_fp8.quantize_rows_fp8(x)
        y = linear_fp8.linear_fp8(q, scale, weight, weight_scale, bias, 1, DTYPE)
        return [q.view(torch.uint8), scale, y], []

    return Launch({"x": random(n, WIDTH, dtype=DTYPE)}, call)


def _feed_forward(n, p):
    w1, w2 = random(WIDTH, 64, dtype=DTYPE), random(64, WIDTH, dtype=DTYPE)
    b1 = random(WIDTH)

    def call(x, dy):
        y, pre = feed_forward.feed_forward_fwd(x, w1, b1, False, True)
        dpre, db1, again = feed_forward.feed_forward_bwd(dy, w2, pre, b1, False, True)
        return [y, pre, dpre, again], [db1]

    return Launch({name: random(n, 64, dtype=DTYPE) for name in ("x", "dy")}, call)


def _attention(n, p, way, mask=False):
    dropout = dropout_args(p)

    def call(qkv, dout):
        filler = len(qkv) - ROWS
        lengths = [filler % LONGEST] + filler // LONGEST * [LONGEST] + list(LENGTHS)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
        bits = None
        if mask and p:
            sizes = LONGEST, len(qkv), HEADS
            bits = _attention_dropout.dropout_mask(cu_seqlens, *sizes, *dropout)
        site = (cu_seqlens, LONGEST, HEAD_DIM**-0.5, *dropout, None, bits)
        out, lse = attention.forward(qkv, *site)
        dqkv = attention.BACKWARDS[way](dout, qkv, out, lse, *site)
        return [out, lse.t(), dqkv], []

    qkv = random(n, 3, HEADS, HEAD_DIM, dtype=DTYPE)
    dout = random(n, HEADS, HEAD_DIM, dtype=DTYPE)
    return Launch({"qkv": qkv, "dout": dout}, call, 3 * HEADS * HEAD_DIM)


def _optimizer(n, p, lamb):
    one, rate = torch.ones((), device=DEVICE), torch.full((), 0.01, device=DEVICE)
    scale = torch.full((1,), 3.0, device=DEVICE)

    def call(param, grad, exp_avg, exp_avg_sq):
        param, exp_avg, exp_avg_sq = (x.clone() for x in (param, exp_avg, exp_avg_sq))
        exp_avg_sq.square_()
        tables = optimizer.tabulate([(param, grad, exp_avg, exp_avg_sq, None, one, rate, 0.01)])
        common = (tables, (0.9, 0.999), 1e-6, True, scale)
        if lamb:
            optimizer.lamb_step(*common, None)
            return [exp_avg, exp_avg_sq], [param]
        optimizer.adamw_step(*common)
        return [exp_avg, exp_avg_sq, param], []

    inputs = {name: random(n) for name in ("param", "exp_avg", "exp_avg_sq")}
    return Launch({**inputs, "grad": random(n, dtype=DTYPE)}, call, 1)


LAUNCHES = {
    "attention two_kernels": partial(_attention, way="two_kernels"),
    "attention short": partial(_attention, way="short"),
    "attention one_pass": partial(_attention, way="one_pass"),
    "attention two_kernels mask": partial(_attention, way="two_kernels", mask=True),
    "attention short mask": partial(_attention, way="short", mask=True),
    "attention one_pass mask": partial(_attention, way="one_pass", mask=True),
    "bias_gelu": _bias_gelu,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_int8": _add_layer_norm_int8,
    "embed_layer_norm": _embed_layer_norm,
    "cross_entropy_rows": _cross_entropy_rows,
    "rows": _rows,
    "linear_int8": _linear_int8,
    "linear_fp8": _linear_fp8,
    "feed_forward": _feed_forward,
    "adamw": partial(_optimizer, lamb=False),
    "lamb": partial(_optimizer, lamb=True),
}


def why_not_here(name):
    """Why this GPU does not run that launch; None where it does."""
    arch = _config.capability(torch.empty(0, device=DEVICE))
    operation, _, way = name.removesuffix(" mask").partition(" ")
    if way in ("short", "one_pass"):
        choose = getattr(_attention_config, f"bwd_{way}")
        if any(choose(HEAD_DIM, DTYPE.itemsize, p, arch) is None for p in (False, True)):
            return "there is no tile for it"
    since = (8, 0) if INTERPRETED else OPS[operation].since if operation in OPS else None
    if since is not None and arch < since and OPS[operation].size_before < HEAD_DIM:
        return "its kernels are for later GPUs"
    return None
