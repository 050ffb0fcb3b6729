"""Accelerated models on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from fastbert.hf import accelerate, verify

from ._models import FAMILY_NAMES, MODEL_NAMES, batch_for, masked_lm, pair, run, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_verify(name: str, dtype: torch.dtype) -> None:
    model = accelerate(tiny(name).to("cuda", dtype))
    report = verify(model)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_autocast(family: str, dtype: torch.dtype) -> None:
    name = masked_lm(family)
    original, ours = (model.cuda() for model in pair(name))
    batch = {key: x.cuda() for key, x in batch_for(name).items()}
    oracle = run(copy.deepcopy(original).double(), batch)
    with torch.autocast("cuda", dtype):
        theirs, mine = run(original, batch), run(ours, batch)
    assert mine.loss is not None and theirs.loss is not None and oracle.loss is not None
    exact = oracle.loss.detach()
    error, reference = (float((r.loss.detach() - exact).abs()) for r in (mine, theirs))
    assert error <= 2 * reference + 4 * torch.finfo(dtype).eps * float(exact)
    assert all(torch.isfinite(gradient).all() for gradient in mine.gradients.values())


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "albert"])
def test_dropout_and_checkpointing(family: str) -> None:
    name = masked_lm(family)
    plain = accelerate(tiny(name, dropout=0.1)).cuda().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {key: x.cuda() for key, x in batch_for(name).items()}
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(7)
        results.append(run(model, batch))
    torch.testing.assert_close(results[0].loss, results[1].loss)
    for key, gradient in results[0].gradients.items():
        torch.testing.assert_close(gradient, results[1].gradients[key], rtol=1e-5, atol=1e-6)
