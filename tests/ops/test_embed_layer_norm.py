"""embed_layer_norm against three ``F.embedding``, ``F.layer_norm`` and a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import embed_layer_norm

from ._masks import drop, hidden_mask, seed_tensor
from ._parity import (
    Function,
    Inputs,
    check_each_gradient_alone,
    check_parity,
    check_same_bits,
    run,
)
from ._targets import Draw, Target, backends_on_cpu, targets

pytestmark = pytest.mark.usefixtures("poison")

on_every_target = pytest.mark.parametrize(
    "target", targets("embed_layer_norm", vectors=True), indirect=True
)
on_cpu_backends = pytest.mark.parametrize(
    "cpu_backend", backends_on_cpu("embed_layer_norm"), indirect=True
)
SHAPES = [
    (0, 64), (1, 64), (1, 1000), (63, 96), (64, 768), (65, 1000), (127, 96), (1000, 64),
]  # fmt: skip
SEED, OFFSET = -5, 2**32 - 1
VOCAB, POSITIONS, TYPES = 101, 40, 2
Ids = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]


def ours(ids: Ids, p: float = 0.0, **options: int) -> Function:
    def call(word, position, token_type, weight, bias):
        return embed_layer_norm(
            *ids, word, position, token_type, weight, bias, **options,
            dropout_p=p, dropout_seed=seed_tensor(SEED, word.device), dropout_offset=OFFSET,
        )  # fmt: skip

    return call


def plain(
    ids: Ids,
    keep: torch.Tensor | None = None,
    p: float = 0.0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Function:
    input_ids, position_ids, token_type_ids = ids

    def call(word, position, token_type, weight, bias):
        e = F.embedding(input_ids, word, padding_idx)
        e = e + F.embedding(position_ids, position, position_padding_idx)
        if token_type is not None:
            e = e + F.embedding(token_type_ids, token_type)
        y = F.layer_norm(e, (word.shape[1],), weight.to(word.dtype), bias.to(word.dtype), eps=1e-12)
        return drop(y, keep, p)

    return call


def example(draw: Draw, tokens: int, hidden: int) -> tuple[Ids, Inputs]:
    ids = draw.ids(VOCAB, tokens), draw.ids(POSITIONS, tokens), draw.ids(TYPES, tokens)
    tables = {
        "word": draw(VOCAB, hidden),
        "position": draw(POSITIONS, hidden),
        "token_type": draw(TYPES, hidden),
        "weight": draw.vector(hidden, scale=0.1, shift=1.0),
        "bias": draw.vector(hidden, scale=0.1),
    }
    return ids, tables


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(target: Target, shape: tuple[int, int], p: float) -> None:
    draw = Draw(target)
    ids, inputs = example(draw, *shape)
    keep = hidden_mask(*shape, p, SEED, OFFSET, target.device)
    check_parity(ours(ids, p), plain(ids, keep, p), inputs, grad=draw(*shape))


@on_every_target
def test_without_token_types(target: Target) -> None:
    draw = Draw(target)
    ids, inputs = example(draw, 65, 96)
    ids, inputs = (*ids[:2], None), inputs | {"token_type": None}
    check_parity(ours(ids), plain(ids), inputs, grad=draw(65, 96))


@on_every_target
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_magnitudes(target: Target, scale: float) -> None:
    scale = min(scale, 100.0) if target.dtype == torch.float16 else scale
    draw = Draw(target)
    ids, inputs = example(draw, 64, 768)
    inputs |= {n: inputs[n] * scale for n in ("word", "position", "token_type")}
    check_parity(ours(ids), plain(ids), inputs, grad=draw(64, 768, scale=scale))


@on_every_target
def test_one_id_for_every_token(target: Target) -> None:
    """The longest sum that a table row can be."""
    draw = Draw(target)
    _, inputs = example(draw, 0, 64)
    ids = tuple(torch.full((1000,), i, device=target.device) for i in (7, 3, 1))
    check_parity(ours(ids), plain(ids), inputs, grad=draw(1000, 64))


@on_every_target
def test_rows_that_no_id_names_have_gradient_0(target: Target) -> None:
    draw = Draw(target)
    ids, inputs = example(draw, 30, 64)
    results = run(ours(ids, p=0.1), inputs, draw(30, 64))
    for name, rows in zip(("word", "position"), ids, strict=False):
        missing = torch.ones(len(inputs[name]), dtype=torch.bool, device=target.device)
        missing[rows] = False
        assert missing.any()
        assert not results[f"d{name}"][missing].any()
        assert results[f"d{name}"][~missing].any(1).all()


@on_every_target
def test_padding_rows_have_gradient_0(target: Target) -> None:
    draw = Draw(target)
    ids, inputs = example(draw, 127, 64)
    ids[0][::3], ids[1][::3] = 5, 1
    padding = {"padding_idx": 5, "position_padding_idx": 1}
    check_parity(ours(ids, **padding), plain(ids, **padding), inputs, grad := draw(127, 64))
    results = run(ours(ids, **padding), inputs, grad)
    assert not results["dword"][5].any()
    assert not results["dposition"][1].any()
    # Row 0 too is a padding row when it is named; None, the default, names none.
    ids[0][::3] = 0
    assert not run(ours(ids, padding_idx=0), inputs, grad)["dword"][0].any()
    assert run(ours(ids), inputs, grad)["dword"][0].any()


@on_every_target
def test_strided_inputs(target: Target) -> None:
    draw = Draw(target)
    ids, dense = example(draw, 64, 96)
    grad = draw(64, 96)
    strided = {n: torch.stack((x, x), -1)[..., 0] for n, x in dense.items()}
    strided_ids = tuple(torch.stack((x, x), -1)[..., 0] for x in ids)
    check_same_bits(
        run(ours(strided_ids), strided, grad.t().contiguous().t()), run(ours(ids), dense, grad)
    )


@on_every_target
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_each_gradient_alone_and_same_bits_twice(target: Target, p: float) -> None:
    draw = Draw(target)
    ids, inputs = example(draw, 127, 96)
    check_each_gradient_alone(ours(ids, p), inputs, grad := draw(127, 96))
    check_same_bits(run(ours(ids, p), inputs, grad), run(ours(ids, p), inputs, grad))


@on_cpu_backends
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_types", [True, False])
def test_gradcheck(cpu_backend: str, with_types: bool, p: float) -> None:
    draw = Draw(Target(cpu_backend, "cpu", torch.float64, torch.float64))
    ids = torch.tensor([1, 3, 3, 0]), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])
    word, position, token_type = (draw(rows, 6).requires_grad_() for rows in (5, 4, 2))
    weight, bias = (draw.vector(6).requires_grad_() for _ in range(2))
    if with_types:
        call, inputs = ours(ids, p, eps=1e-5), (word, position, token_type, weight, bias)
    else:
        without = ours((*ids[:2], None), p, eps=1e-5)
        call = lambda w, p, *vectors: without(w, p, None, *vectors)  # noqa: E731
        inputs = (word, position, weight, bias)
    assert torch.autograd.gradcheck(call, inputs)


@on_cpu_backends
@pytest.mark.parametrize(
    ("name", "bound"),
    [("input_ids", VOCAB), ("position_ids", POSITIONS), ("token_type_ids", TYPES)],
)
@pytest.mark.parametrize("beyond", [-1, 0, 2**40, -(2**63)])
def test_id_out_of_its_table(cpu_backend: str, name: str, bound: int, beyond: int) -> None:
    ids, inputs = example(Draw(Target(cpu_backend, "cpu", torch.float32, torch.float32)), 9, 64)
    place = ("input_ids", "position_ids", "token_type_ids").index(name)
    ids[place][4] = beyond if beyond < 0 else bound + beyond
    with pytest.raises(ValueError, match=rf"^{name}.*{ids[place][4]}"):
        ours(ids)(**inputs)


def table(rows: int, hidden: int = 8, **options) -> torch.Tensor:
    return torch.ones(rows, hidden, **options)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("input_ids", {"input_ids": torch.zeros(3, dtype=torch.int32)}),
        ("input_ids", {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}),
        ("input_ids", {"input_ids": [0, 1, 2]}),
        ("input_ids", {"input_ids": torch.zeros(3, dtype=torch.int64, device="meta")}),
        ("position_ids", {"position_ids": torch.zeros(4, dtype=torch.int64)}),
        ("position_ids", {"position_ids": torch.zeros(3)}),
        ("token_type_ids", {"token_type_ids": torch.zeros(2, dtype=torch.int64)}),
        ("token_type_ids", {"token_type_ids": None}),
        ("token_type_ids", {"token_type": None}),
        ("word", {"word": torch.ones(8)}),
        ("word", {"word": table(5, dtype=torch.int64)}),
        ("position", {"position": table(5, 9)}),
        ("position", {"position": table(5, dtype=torch.bfloat16)}),
        ("token_type", {"token_type": table(2, 7)}),
        ("token_type", {"token_type": table(2, dtype=torch.float64)}),
        ("weight", {"weight": torch.ones(9)}),
        ("bias", {"bias": torch.ones(8, dtype=torch.float16)}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout_seed", {"dropout_p": 0.5}),
    ],
)
def test_bad_input(name: str, arguments: dict) -> None:
    good = {
        "input_ids": torch.arange(3),
        "position_ids": torch.arange(3),
        "token_type_ids": torch.zeros(3, dtype=torch.int64),
        "word": table(5),
        "position": table(5),
        "token_type": table(2),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    }
    with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
        embed_layer_norm(**(good | arguments))
