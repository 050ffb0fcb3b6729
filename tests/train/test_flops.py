"""Model FLOPs against hand computation, PaLM's formula and torch's own counter; peaks."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastbert import BertConfig
from fastbert.nn import LMPredictions
from fastbert.train import flops
from fastbert.train.flops import TRAINING, encoder_flops, matrix_weights, peak

CONFIG = BertConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=16,
)  # fmt: skip


def test_palm_appendix_b() -> None:
    """6 N + 12 L H n a token, of which N = L (4 H² + 2 H I)."""
    config, length = BertConfig(), 128
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    a_token = TRAINING * encoder_flops(config, [length] * 32) / (32 * length)
    assert a_token == 6 * weights + 12 * layers * hidden * length


def test_what_transformers_computes() -> None:
    """torch counts the products of one padded-free row."""
    hf = transformers.BertModel(
        transformers.BertConfig(**{k: getattr(CONFIG, k) for k in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings")}, attn_implementation="eager"),
        add_pooling_layer=False,
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(torch.ones(2, 11, dtype=torch.long))
    assert counter.get_total_flops() == encoder_flops(CONFIG, [11, 11])


def test_rows_and_lengths_by_hand() -> None:
    """One layer of H 24, I 40 on sequences of 5, 0 and 2, three of whose seven tokens are read."""
    config = CONFIG.replace(num_hidden_layers=1)
    products = 7 * 3 * 24 * 24 + 3 * (24 * 24 + 2 * 24 * 40) + 2 * 24 * (25 + 4)
    assert encoder_flops(config, [5, 0, 2], rows=3) == 2 * products
    whole = encoder_flops(CONFIG, [5, 0, 2])
    assert whole - encoder_flops(CONFIG, [5, 0, 2], rows=3) == 2 * 4 * (24 * 24 + 2 * 24 * 40)
    assert encoder_flops(CONFIG.replace(num_hidden_layers=0), [5], rows=3) == 0


def test_weights_of_heads() -> None:
    """The decoder counts, which the head multiplies by; a table that rows are taken of does not."""
    head = LMPredictions(CONFIG.replace(tie_word_embeddings=False))
    assert matrix_weights(head) == 24 * 24 + 50 * 24
    assert matrix_weights(nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989.5), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA A10G", None), ("NVIDIA L40", None),
    ],
)  # fmt: skip
def test_gpus_by_name(name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not listed is measured."""
    monkeypatch.setattr(flops.devices, "cuda_name", lambda index: name)
    monkeypatch.setattr(flops, "_measured", lambda device, dtype: dtype)
    found = peak(torch.device("cuda", 0), "bf16")
    assert found == (torch.bfloat16 if expected is None
                     else (expected * 1e12, f"datasheet of {name}"))  # fmt: skip


def test_fp32_on_a_gpu_is_tf32_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops.devices, "cuda_name", lambda index: "NVIDIA H200")
    for asked, expected in (("highest", 67e12), ("high", 494.7e12)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda asked=asked: asked)
        assert peak(torch.device("cuda", 0), "no").flop_s == pytest.approx(expected)


def test_a_cpu_is_measured_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    found = peak(torch.device("cpu"), "no")
    assert 1e8 < found.flop_s < 1e15
    assert found.source == "measured: a product of 1024 x 1024 in float32"
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_on_a_cpu_is_the_faster_of_its_own_and_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (torch.bfloat16, torch.float32)
    for fast in kinds:
        found = {kind: flops.Peak(1 + (kind == fast), str(kind)) for kind in kinds}
        monkeypatch.setattr(flops, "_measured", lambda _, kind, found=found: found[kind])
        assert peak(torch.device("cpu"), "bf16") == (2, str(fast))
