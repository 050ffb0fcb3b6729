"""attn_implementation="fastbert" for encoders that accelerate does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastbert.hf import accelerate, register_attention
from fastbert.hf.attention_interface import attention_forward

from ._models import batch_for, lengths_mask, tiny

SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip


def models(config: Any, cls: Any, attention: str) -> Any:
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation=attention).eval()


def unknown_encoder(attention: str) -> Any:
    """An encoder of transformers that fastbert has no table for."""
    config = transformers.RobertaPreLayerNormConfig(**SMALL)
    return models(config, transformers.RobertaPreLayerNormModel, attention)


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_unknown_encoder(side: str) -> None:
    register_attention()
    original, ours = unknown_encoder("sdpa"), unknown_encoder("fastbert")
    with pytest.raises(ValueError, match="holds no model"):
        accelerate(unknown_encoder("sdpa"))
    mask = lengths_mask(side=side)
    batch = {"input_ids": torch.randint(2, 90, mask.shape), "attention_mask": mask}
    expected, output = original(**batch)[0], ours(**batch)[0]
    real = mask != 0
    torch.testing.assert_close(output[real], expected[real])
    for x in (expected, output):
        (x[real] ** 3).mean().backward()
    for p, q in zip(ours.parameters(), original.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    del batch["attention_mask"]
    torch.testing.assert_close(ours(**batch)[0], original(**batch)[0])


def test_a_known_model_with_it_and_accelerated() -> None:
    original = tiny("BertModel")
    ours = tiny("BertModel")
    ours.set_attn_implementation("fastbert")
    batch = batch_for("BertModel")
    mask = batch["attention_mask"] != 0
    expected = original(**batch)[0][mask]
    torch.testing.assert_close(ours(**batch)[0][mask], expected)
    torch.testing.assert_close(accelerate(ours)(**batch)[0][mask], expected)


def test_dropout_follows_the_generator() -> None:
    register_attention()
    model = unknown_encoder("fastbert").train()
    ids = torch.randint(2, 90, (2, 6))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model(ids)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_causal_model_is_an_error() -> None:
    register_attention()
    config = transformers.GPT2Config(
        vocab_size=90, n_embd=48, n_layer=1, n_head=4, n_positions=40, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = models(config, transformers.GPT2Model, "fastbert")
    with pytest.raises(ValueError, match="bidirectional"):
        model(torch.randint(2, 90, (2, 6)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"key": torch.zeros(1, 2, 3, 4)}, "one shape"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"is_causal": True}, "causal"),
        ({"sliding_window": 4}, "sliding_window"),
    ],
)
def test_what_it_does_not_compute(changes: dict[str, Any], match: str) -> None:
    x = torch.zeros(1, 4, 3, 4)
    call = {"query": x, "key": x, "value": x, "attention_mask": None, **changes}
    with pytest.raises(ValueError, match=match):
        attention_forward(nn.Module(), **call)
