"""The FLOPs that a batch counts for are those of the products that torch sees in a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.ops import use_backend
from fastbert.pretrain import parse
from fastbert.train.flops import TRAINING

from ._models import CONFIG, batch_of, model_of, texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name",
    ["mlm", "mlm+nsp", "mlm+sbo", "mlm+capitalised", "mlm+word-order+3way", "plm", "unilm2",
     "bart", "rtd"],
)  # fmt: skip
def test_flops(name: str) -> None:
    objectives = parse(name)
    model, batch = model_of(objectives), batch_of(objectives, texts(20, 7, 31))
    with use_backend("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    seen = counter.get_total_flops()
    if name == "rtd":  # sampling is no training: it is the product with the vocabulary again
        masked = len(batch.targets["rtd"]["labels"])
        seen -= 2 * masked * CONFIG.vocab_size * CONFIG.hidden_size
    assert model.flops(batch) == TRAINING * seen
