"""Every op under torch.compile, and its registration with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastbert import ops
from fastbert.ops import (
    add_layer_norm_int8,
    attention,
    choices,
    column_sums,
    linear_fp8,
    linear_int8,
    quantize_rows,
    quantize_rows_fp8,
    use_backend,
)

from ._masks import seed_tensor
from ._parity import ATOL, check_same_bits, error, run
from ._samples import DIM, HEADS, HIDDEN, INNER, samples
from ._targets import Draw, Target

FLOAT32 = Target("automatic", "cpu", torch.float32, torch.float32)
FLOAT64 = Target("automatic", "cpu", torch.float64, torch.float64)
NAMES = list(samples(FLOAT32, 0.0))
WITH_DROPOUT = ("attention", "add_layer_norm", "embed_layer_norm")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_every_public_function_has_a_sample() -> None:
    functions = {name for name in ops.__all__ if name in vars(ops) and name.islower()}
    # Not differentiable: the tests of eight bits in one graph compile them.
    int8 = {"quantize_rows", "linear_int8", "column_sums", "add_layer_norm_int8"}
    fp8 = {"quantize_rows_fp8", "linear_fp8"}
    layout = {"packed_layout"}  # has tests of its own
    assert functions - {"choices", "use_backend"} - int8 - fp8 - layout == set(NAMES)


@pytest.mark.parametrize(
    ("name", "p"), [(n, 0.0) for n in NAMES] + [(n, 0.1) for n in WITH_DROPOUT]
)
def test_one_graph_equals_eager(name: str, p: float) -> None:
    """Without Inductor: the graph calls the same kernels, so those alone give the same bits."""
    sample = samples(FLOAT32, p)[name]
    compiled = torch.compile(sample.call, backend="aot_eager", fullgraph=True)
    results = run(compiled, sample.inputs, sample.grad)
    expected = run(sample.call, sample.inputs, sample.grad)
    if sample.pure:
        check_same_bits(results, expected)
    for key, x in expected.items():
        assert error(results[key], x.double()) <= 2 * ATOL[torch.float32], key


def test_inductor_with_dynamic_shapes_and_seeds() -> None:
    """One compilation serves other lengths and other seeds: neither is burnt into the graph."""
    draw = Draw(FLOAT32)
    parameters = {
        "word": draw(31, HIDDEN),
        "position": draw(31, HIDDEN),
        "weight": draw.vector(HIDDEN, scale=0.1, shift=1.0),
        "bias": draw.vector(HIDDEN, scale=0.1),
        "qkv": draw(3 * HIDDEN, HIDDEN, scale=0.1),
        "x_bias": draw.vector(HIDDEN),
        "w1": draw(INNER, HIDDEN, scale=0.1),
        "b1": draw.vector(INNER),
        "w2": draw(HIDDEN, INNER, scale=0.1),
        "decoder": draw(31, HIDDEN, scale=0.2),
    }

    def encoder(
        ids, cu_seqlens, longest, seed,
        word, position, weight, bias, qkv, x_bias, w1, b1, w2, decoder,
    ):  # fmt: skip
        dropout = {"dropout_p": 0.1, "dropout_seed": seed}
        x = ops.embed_layer_norm(ids, ids, None, word, position, None, weight, bias, **dropout)
        heads = ops.linear(x, qkv).view(-1, 3, HEADS, DIM)
        out, _ = ops.attention(heads, cu_seqlens, longest, **dropout, dropout_offset=1)
        out = out.reshape(-1, HIDDEN)
        x = ops.add_layer_norm(out, x, weight, bias, x_bias=x_bias, **dropout, dropout_offset=2)
        return ops.linear_cross_entropy(ops.feed_forward(x, w1, b1, w2), decoder, None, ids)

    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    losses = []
    for lengths, seed in (((20, 1, 33), 5), ((20, 1, 33), 6), ((7, 0, 3, 60), 5)):
        ids = draw.ids(31, sum(lengths))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        context = ids, cu_seqlens, max(lengths), seed_tensor(seed)
        with torch.compiler.set_stance("fail_on_recompile" if losses else "default"):
            results = run(functools.partial(compiled, *context), parameters)
        expected = run(functools.partial(encoder, *context), parameters)
        for key, x in expected.items():  # Inductor may sum in another order
            assert error(results[key], x.double()) <= 8 * ATOL[torch.float32], key
        losses.append(results["out"])
    assert losses[0] != losses[1]


def test_strided_input_under_compile() -> None:
    sample = samples(FLOAT32, 0.1)["add_layer_norm"]
    strided = sample.inputs | {"x": sample.inputs["x"].t().contiguous().t()}
    compiled = torch.compile(sample.call, backend="aot_eager", fullgraph=True)
    check_same_bits(
        run(compiled, strided, sample.grad), run(sample.call, sample.inputs, sample.grad)
    )


def test_int8_in_one_graph() -> None:
    def product(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        x, q, scale, offset = add_layer_norm_int8(x, None, x[0], x[1])
        assert quantize_rows(x)[0].shape == q.shape
        sums = column_sums(w, s)
        narrow = linear_int8(q, scale, w, s, output_scale=s[:1])
        y = linear_int8(q, scale, w, s, offset=offset, column_sum=sums, activation="gelu")
        return y + narrow

    draw = torch.Generator().manual_seed(0)
    w = torch.randint(-127, 128, (16, 32), generator=draw, dtype=torch.int8)
    x, s = torch.randn(9, 32, generator=draw), torch.rand(16, generator=draw) * 1e-3
    with use_backend("reference"):
        compiled = torch.compile(product, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, w, s), product(x, w, s))


def test_fp8_in_one_graph() -> None:
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_fp8(*quantize_rows_fp8(x), *quantize_rows_fp8(w), x[0, :16])

    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 32, generator=draw), torch.randn(16, 32, generator=draw)
    with use_backend("reference"):
        compiled = torch.compile(product, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, w), product(x, w))


def test_bad_offsets_under_compile() -> None:
    """Checked by the kernels then: values are unknown while a graph is traced."""
    if choices("cpu", torch.float32, {})[0]["backend"] == "reference":
        pytest.skip("no kernel here that checks")
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    descending = torch.tensor([0, 5, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(torch.ones(6, 3, 2, 8), descending, 6)


# ------------------------------------------------------------------------------- torch.library


def library_calls(p: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every operator of the namespace, by name, that want all gradients there are."""
    draw = Draw(FLOAT64)
    seed = seed_tensor(7) if p else None
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)

    def leaf(*shape: int) -> torch.Tensor:
        return draw(*shape).requires_grad_()

    attend = cu_seqlens, 4, 0.5, p, seed, 1
    qkv, head = leaf(7, 3, 2, 4), draw(7, 2, 4)
    yield "attention", (qkv, *attend)
    out, lse = torch.ops.fastbert.attention(qkv.detach(), *attend)
    yield "attention_bwd", (head, qkv.detach(), out, lse, *attend)
    for heads in (1, 2):
        bias = draw(heads, 7, 5)
        bias[:, 2] = -torch.inf
        yield "attention", (qkv, *attend, bias)
        out, lse = torch.ops.fastbert.attention(qkv.detach(), *attend, bias)
        yield "attention_bwd", (head, qkv.detach(), out, lse, *attend, bias)

    x, grad, weight, bias = leaf(7, 6), draw(7, 6), leaf(6), leaf(6)
    yield "bias_gelu", (x, bias, False)
    yield "bias_gelu_bwd", (grad, x.detach(), bias.detach(), True)
    yield "bias_gelu_bwd", (grad, x.detach(), None, True)

    yield "add_layer_norm", (x, leaf(7, 6), leaf(6), weight, bias, 1e-5, p, seed, 1, True)
    yield "add_layer_norm", (draw(7, 6), None, None, draw(6), draw(6), 1e-5, p, seed, 1, False)
    mean, rstd = draw(7), draw(7).abs()
    for x_bias in (None, draw(6)):
        yield "add_layer_norm_bwd", (grad, draw(7, 6), draw(6), mean, rstd, p, seed, 1, x_bias)

    ids = torch.tensor([0, 1, 1, 4, 2, 0, 3])
    types = ids % 2
    for token_type_ids, token_type in ((types, leaf(2, 6)), (None, None)):
        tables = leaf(5, 6), leaf(6, 6), token_type
        tail = 0, -1, p, seed, 1
        yield (
            "embed_layer_norm",
            (ids, ids, token_type_ids, *tables, weight, bias, 1e-5, *tail),
        )
        constant = [None if t is None else t.detach() for t in (*tables, weight)]
        yield (
            "embed_layer_norm_bwd",
            (grad, ids, ids, token_type_ids, *constant, mean, rstd, *tail),
        )

    yield "linear", (x, leaf(5, 6), leaf(5))
    yield "linear", (draw(7, 6), draw(5, 6), None)
    for wants in ((True, True, True), (True, False, False), (False, True, False)):
        yield "linear_bwd", (draw(7, 5), x.detach(), draw(5, 6), *wants)
    index = torch.tensor([0, 2, 6])
    yield "gather_rows", (x, index)
    yield "gather_rows_bwd", (draw(3, 6), index, 7)
    yield "scatter_rows", (leaf(3, 6), index, 7)
    yield "scatter_rows_bwd", (grad, index)
    yield "packed_layout", (torch.tensor([[1, 0, 2], [0, 0, 0], [0, 1, 1]]),)
    yield "linear_cross_entropy", (x, leaf(5, 6), leaf(5), ids, 4, True)
    yield "linear_cross_entropy", (x, leaf(5, 6), None, ids, 4, False)
    yield "quantize_rows", (draw(7, 6),)
    q, scale, offset = ops.quantize_rows(draw(7, 6))
    weight = ops.quantize_rows(draw(5, 6))[:2]
    bias = draw(5).float()
    yield "linear_int8", (q, scale, *weight, None, None, None, 0, torch.float32, None)
    yield "linear_int8", (q, scale, *weight, bias, offset, bias, 1, torch.bfloat16, None)
    yield "linear_int8", (q, scale, *weight, bias, offset, bias, 1, torch.bfloat16, bias[:1].abs())
    yield (
        "add_layer_norm_int8",
        (draw(7, 6), draw(7, 6), draw(6), draw(6), draw(6), draw(6).float(), 1e-5),
    )
    yield "add_layer_norm_int8", (draw(7, 6), None, None, draw(6), draw(6), None, 1e-5)
    yield "quantize_rows_fp8", (draw(7, 6),)
    fp8 = *ops.quantize_rows_fp8(draw(7, 6)), *ops.quantize_rows_fp8(draw(5, 6))
    yield "linear_fp8", (*fp8, bias, 1, torch.bfloat16)
    yield "linear_fp8", (*fp8, None, 0, torch.float32)


def test_every_operator_has_a_call() -> None:
    registered = {
        name.removeprefix("fastbert::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastbert::")
    }
    assert registered == {name for name, _ in library_calls(0.1)}


@pytest.mark.parametrize(("backend", "p"), [("reference", 0.0), ("auto", 0.3)])
def test_opcheck(backend: str, p: float) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes."""
    every = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    with use_backend(backend):
        for name, arguments in library_calls(p):
            op = getattr(torch.ops.fastbert, name).default
            # torch's schema check multiplies its copies of the tensors, which fp8 does not know.
            utils = every[1:] if name.endswith("fp8") else every
            torch.library.opcheck(op, arguments, test_utils=utils)
