"""The encoder through torch, which GPUs take: an exact integer Linear, and the engine's outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastbert.compress import quantize, torch_path
from fastbert.compress.encoder import _copies
from fastbert.compress.torch_path import quantized_linear
from fastbert.compress.weights import quantize_weight
from fastbert.runtime.reference import linear

from ..hf._models import FAMILY_NAMES, batch_for, masked_lm, tiny

# Activations are rounded to bf16, by 2^-9 at most, some twenty times in three layers, and what an
# int8 step makes of each difference comes on top.
BF16_STEP = 2**-6


@pytest.mark.parametrize("rows, inner, outer", [(0, 8, 8), (1, 5, 3), (9, 48, 40), (3, 2000, 7)])
@pytest.mark.parametrize("static", [False, True])
def test_quantized_linear_is_the_definition(
    rows: int, inner: int, outer: int, static: bool
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer)
    weight[0] = 0.0
    if rows > 1:
        x[0], x[1, 0] = 0.0, 1000.0
    q, scale = quantize_weight(weight)
    tensors = {"a.weight": q, "a.weight_scale": scale, "a.bias": bias.numpy()}
    fixed = None
    if static:
        tensors["a.input_scale"] = np.array([0.02], np.float32)
        fixed = torch.tensor([0.02])
    got = quantized_linear(x, torch.from_numpy(q), torch.from_numpy(scale), bias, fixed)
    np.testing.assert_allclose(got.numpy(), linear(tensors, "a", x.numpy()), rtol=1e-6, atol=1e-6)
    if not static and rows:
        step = x.abs().amax(1, keepdim=True) / 127
        bound = 0.5 * step * weight.abs().sum(1) + 0.5 * torch.from_numpy(scale) * x.abs().sum(
            1, keepdim=True
        )
        assert ((got - (x @ weight.T + bias)).abs() <= bound * 1.02 + 1e-4).all()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("scheme", ["int8-dynamic", "bf16"])
def test_the_whole_encoder(family: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = masked_lm(family)
    quantised, batch = quantize(tiny(name), scheme), batch_for(name)
    with torch.no_grad():
        expected = quantised(**batch, output_hidden_states=True).hidden_states
        quantised.encoder._built.clear()
        monkeypatch.setattr(quantised.encoder, "_on_cpu", quantised.encoder._in_torch)
        got = quantised(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected)
    for ours, wanted in zip(got, expected, strict=True):
        # A value next to the middle of two integers may be rounded either way, one step apart.
        bound = 1e-5 if scheme == "bf16" else 1e-2
        assert (ours - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "bf16"])
def test_activations_in_bf16(scheme: str, native: Any, batches: Any) -> None:
    """As on a GPU, beside the same with fp32 between the kernels."""
    encoder = quantize(native(), scheme, calibration=batches).encoder
    with torch.no_grad():
        tensors = torch_path.with_column_sums(_copies(encoder.tensors, torch.device("cpu")))
        for batch in batches:
            wide, _ = torch_path.encode(encoder.config, tensors, batch)
            got, _ = torch_path.encode(encoder.config, tensors, batch, dtype=torch.bfloat16)
            assert got.dtype == torch.float32
            assert 0 < (got - wide).norm() <= BF16_STEP * wide.norm()


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_no_pass_of_its_own_quantises_what_a_layer_norm_made(
    smooth: float | None, native: Any, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quantize_rows is left with the embeddings and, in every layer, what attention and GELU made;
    the sums of the weights are there beforehand."""
    encoder = quantize(native(), "int8-dynamic", smooth_quant=smooth).encoder
    tensors = torch_path.with_column_sums(_copies(encoder.tensors, torch.device("cpu")))
    calls = []
    count = torch_path.quantize_rows
    monkeypatch.setattr(torch_path, "quantize_rows", lambda x: calls.append(len(x)) or count(x))
    monkeypatch.setattr(torch_path, "column_sums", None)
    torch_path.encode(encoder.config, tensors, batches[0])
    assert len(calls) == 1 + 2 * len(encoder.config["layers"])


@pytest.mark.gpu
def test_on_a_gpu(native: Any, batches: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    quantised = quantize(native())
    with torch.no_grad():
        expected = quantised(input_ids=batches[1].input_ids[None]).last_hidden_state
        quantised.to("cuda")
        got = quantised(input_ids=batches[1].input_ids[None].cuda()).last_hidden_state
    assert got.is_cuda
    assert (got.cpu() - expected).norm() <= BF16_STEP * expected.norm()
