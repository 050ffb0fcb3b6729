"""torch.compile around accelerated models: right results, and no compilation a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastbert.hf import register_attention

from ._models import batch_for, check_parity, lengths_mask, pair, tiny

BACKEND = "aot_eager"  # all of Dynamo and AOTAutograd, without waiting for a C++ compiler


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForSequenceClassification"])
def test_compiled_model(name: str) -> None:
    original, ours = pair(name)
    compiled = torch.compile(ours, backend=BACKEND)
    for lengths in ((11, 1, 7, 4), (11, 11, 2, 5), (3, 9, 11, 11)):
        batch = batch_for(name, lengths_mask(lengths))
        check_parity(original, ours, batch)
        torch.testing.assert_close(compiled(**batch).loss, original(**batch).loss)


def test_compiled_in_place() -> None:
    original, ours = pair("BertForMaskedLM")
    ours.compile(backend=BACKEND)
    check_parity(original, ours, batch_for("BertForMaskedLM"))


class Pooled(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return {"embedding": self.scale * (hidden * mask).sum(1) / mask.sum(1)}


def test_compiled_around_a_model() -> None:
    original, ours = (Pooled(model) for model in pair("BertModel"))
    graphs = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, backend=count)
    for lengths in ((11, 1, 7, 4), (11, 11, 2, 5), (3, 9, 11, 11), (11, 1, 1, 1)):
        batch = batch_for("BertModel", lengths_mask(lengths))
        expected = original(**batch)["embedding"]
        torch.testing.assert_close(compiled(**batch)["embedding"], expected)
    assert len(graphs) == 1  # what follows the encoder; compiled once for all lengths


def test_compiled_attention_interface() -> None:
    register_attention()
    original, ours = tiny("BertModel"), tiny("BertModel")
    ours.set_attn_implementation("fastbert")
    compiled = torch.compile(ours, backend="eager")
    for lengths in ((11, 1, 7, 4), (11, 11, 2, 5)):
        batch = batch_for("BertModel", lengths_mask(lengths))
        mask = batch["attention_mask"] != 0
        expected = original(**batch)[0][mask]
        torch.testing.assert_close(compiled(**batch)[0][mask], expected)


def test_export_takes_the_original_path() -> None:
    original, ours = pair("BertModel")
    batch = batch_for("BertModel")
    program = torch.export.export(ours, (), batch, strict=False)
    other = batch_for("BertModel", seed=5)
    mask = other["attention_mask"] != 0
    output = program.module()(**other)[0]
    torch.testing.assert_close(output[mask], original(**other)[0][mask])
