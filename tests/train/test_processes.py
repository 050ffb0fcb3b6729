"""Ways of sharing work out that are refused, and sums of one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastbert.train.processes import mean, prepare, summed


@pytest.mark.parametrize(
    ("kind", "named"),
    [("FSDP", "FSDP version 1"), ("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON_LM")],
)
def test_what_is_not_supported_says_what_is(kind: str, named: str) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=False)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf"^accelerate: got {named}, expected DDP or FSDP2 \("):
        prepare(accelerator, model, torch.optim.SGD(model.parameters()))


def test_one_process_has_nothing_to_add_up() -> None:
    alone = SimpleNamespace(num_processes=1)
    assert summed(alone, [3, 4]) == [3, 4]
    assert mean(alone, [torch.tensor(1.0), torch.tensor(2.5)]).item() == 3.5
