"""Every family and every task head against the model as transformers computes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastbert.hf import accelerate

from ._models import (
    FAMILY_NAMES,
    MODEL_NAMES,
    batch_for,
    check_parity,
    lengths_mask,
    masked_lm,
    pair,
    tiny,
)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_outputs_loss_and_gradients(name: str) -> None:
    original, ours = pair(name)
    # The original lets the logits of padding into the softmax of question answering.
    mask = lengths_mask((11,) * 4) if name.endswith("QuestionAnswering") else None
    check_parity(original, accelerate(ours, strict=True), batch_for(name, mask))


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if "MaskedLM" in n or "Token" in n])
def test_left_padding(name: str) -> None:
    original, ours = pair(name)
    check_parity(original, ours, batch_for(name, lengths_mask(side="left")))


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if n.endswith("QuestionAnswering")])
def test_question_answering_leaves_padding_out(name: str) -> None:
    """Each row of a padded batch counts as it would alone, without padding."""
    original, ours = pair(name)
    batch = batch_for(name)
    output = ours(**batch)
    losses = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = original(**{k: x[row : row + 1, ..., :length] if x.dim() > 1 else x[row : row + 1]
                            for k, x in batch.items()})  # fmt: skip
        torch.testing.assert_close(output.start_logits[row, :length], alone.start_logits[0])
        losses.append(alone.loss)
        assert (output.start_logits[row, length:] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (torch.rand(4), {"num_labels": 1}),
        (torch.rand(4, 3), {"problem_type": "regression"}),
        (torch.randint(0, 2, (4, 3)).float(), {}),
        (torch.randint(0, 2, (4, 3)).float(), {"problem_type": "multi_label_classification"}),
        (torch.randint(0, 3, (4,)), {"problem_type": "single_label_classification"}),
        (torch.randint(0, 3, (4,)).int(), {}),
    ],
)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_problem_types(family: str, labels: torch.Tensor, changes: dict[str, Any]) -> None:
    name = f"{family}ForSequenceClassification"
    original, ours = pair(name, **changes)
    if labels.dtype == torch.int:
        labels = labels.long()
    batch = {**batch_for(name), "labels": labels}
    torch.testing.assert_close(ours(**batch).loss, original(**batch).loss)
    assert ours.config.problem_type == original.config.problem_type


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "relu"]
)
def test_activations(activation: str) -> None:
    original, ours = pair("BertModel", hidden_act=activation)
    check_parity(original, ours, batch_for("BertModel"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ten_steps_of_adamw(family: str) -> None:
    name = masked_lm(family)
    batch = batch_for(name)
    trajectories = []
    for model in pair(name):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trajectory = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            trajectory.append(loss.detach())
        trajectories.append(torch.stack(trajectory))
    original, ours = trajectories
    assert original[-1] < original[0] - 0.05
    torch.testing.assert_close(ours, original, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    name = masked_lm(family)
    original, ours = pair(name)
    assert list(ours.state_dict()) == list(original.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path).eval()
    batch = batch_for(name)
    assert torch.equal(loaded(**batch).logits, original(**batch).logits)
    again = accelerate(copy.deepcopy(loaded))
    assert torch.equal(again(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float64_is_exact(family: str) -> None:
    name = masked_lm(family)
    original, ours = (model.double() for model in pair(name))
    batch = batch_for(name)
    mask = batch["attention_mask"] != 0
    difference = ours(**batch).logits - original(**batch).logits
    assert difference[mask].abs().max() < 1e-12


def test_labels_on_padding_do_not_count() -> None:
    _, ours = pair("BertForMaskedLM")
    batch = batch_for("BertForMaskedLM")
    padding = batch["attention_mask"] == 0
    stray = {**batch, "labels": batch["labels"].masked_fill(padding, 5)}
    assert torch.equal(ours(**stray).loss, ours(**batch).loss)


def test_electra_without_projection() -> None:
    original, ours = pair("ElectraModel", embedding_size=48)
    assert not hasattr(tiny("ElectraModel", embedding_size=48), "embeddings_project")
    check_parity(original, ours, batch_for("ElectraModel"))
