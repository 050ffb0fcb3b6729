"""Two hundred steps of masked-LM training on real text: the kernels' loss curve is the reference's.

Rounding makes any two runs part after some dozens of steps. How far is no matter as long as they
stay closer than runs of the reference that differ in nothing but the seed of weights and dropout.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import fastbert
from fastbert import device
from fastbert.ops import BACKENDS, _reference, _registry, use_backend

pytestmark = pytest.mark.slow

STEPS, WINDOW, SEEDS = 200, 10, (0, 1, 2)
MASK, SEQUENCES, SHORTEST, LONGEST = 1, 6, 5, 64
CONFIG = fastbert.BertConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=64, pad_token_id=0,
    attention_probs_dropout_prob=0.0,  # the reference's takes most of the time
)  # fmt: skip

feed_forward = importlib.import_module("fastbert.ops.feed_forward")
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.cuda_reason() is not None, reason="no NVIDIA GPU is visible"),
]


def batches(where: str) -> Iterator[tuple[fastbert.PackedBatch, torch.Tensor]]:
    """Pieces of Python's manual, SEQUENCES a step, 15% of their characters masked."""
    text = "".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([min(ord(c), 127) for c in text])
    draw = torch.Generator().manual_seed(99)
    for _ in range(STEPS):
        lengths = torch.randint(SHORTEST, LONGEST, (SEQUENCES,), generator=draw).tolist()
        starts = torch.randint(len(codes) - LONGEST, (SEQUENCES,), generator=draw).tolist()
        ids = torch.cat([codes[s : s + n] for s, n in zip(starts, lengths, strict=True)])
        chosen = torch.rand(len(ids), generator=draw) < 0.15
        chosen[0] = True
        labels = torch.where(chosen, ids, -100)
        packed = fastbert.PackedBatch.from_flat(torch.where(chosen, MASK, ids), lengths)
        yield packed.to(where), labels.to(where)


def curve(backend: str, seed: int, where: str, dtype: torch.dtype) -> torch.Tensor:
    """The losses of every step, averaged over WINDOW steps, (STEPS / WINDOW,) fp64."""
    torch.manual_seed(seed)
    model = fastbert.BertForMaskedLM(CONFIG).to(device=where, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with use_backend(backend):
        for batch, labels in batches(where):
            loss = model(batch=batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
    return torch.stack(losses).cpu().view(-1, WINDOW).mean(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def references(where: str, dtype: torch.dtype) -> torch.Tensor:
    """(seeds, STEPS / WINDOW)"""
    return torch.stack([curve("reference", seed, where, dtype) for seed in SEEDS])


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def distance_and_noise(ours: torch.Tensor, references: torch.Tensor) -> tuple[float, float]:
    """How far ours is from the reference of its seed, and how far references are from each other,
    both in RMS over the curve."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    noise = [rms(references[i] - references[j]) for i, j in pairs]
    return rms(ours - references[0]), sum(noise) / len(noise)


@pytest.mark.parametrize(
    ("backend", "where", "dtype", "fused"),
    [
        ("cpp", "cpu", torch.float32, False),
        pytest.param("triton", "cuda", torch.float32, False, marks=on_a_gpu),
        pytest.param("triton", "cuda", torch.bfloat16, False, marks=on_a_gpu),
        pytest.param("triton", "cuda", torch.bfloat16, True, marks=on_a_gpu),
    ],
)
def test_the_curve_is_the_references(
    backend: str, where: str, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = BACKENDS[backend].reason(where)
    if reason is not None:
        pytest.skip(reason)
    if fused:
        monkeypatch.setattr(feed_forward, "FUSED", frozenset({"fwd", "bwd"}))
    expected = references(where, dtype)
    assert (expected[:, -1] < 0.8 * expected[:, 0]).all(), "the reference learns"
    ours = curve(backend, SEEDS[0], where, dtype)
    distance, noise = distance_and_noise(ours, expected)
    assert distance < noise, (distance, noise)
    # Where the curve begins, nothing has parted yet.
    early = abs(float(ours[0] - expected[0, 0]))
    assert early < 0.1 * rms(expected[1:, 0] - expected[0, 0]) + 1e-3, early


def test_a_wrong_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The criterion itself: with GELU's gradient of the wrong sign the curve leaves the noise."""
    right = _reference.bias_gelu_bwd

    def wrong(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(-gradient for gradient in right(*arguments))

    expected = references("cpu", torch.float32)
    monkeypatch.setattr(_reference, "bias_gelu_bwd", wrong)
    _registry._launcher.cache_clear()
    try:
        ours = curve("reference", SEEDS[0], "cpu", torch.float32)
    finally:
        monkeypatch.undo()
        _registry._launcher.cache_clear()
    distance, noise = distance_and_noise(ours, expected)
    assert distance > noise
