"""Tiny models of every task, native and Hugging Face's, with inputs for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers

import fastbert
from fastbert.packed import PackedBatch

Tensor = torch.Tensor
Inputs = dict[str, Any]

TASKS = (
    "SequenceClassification",
    "regression",
    "several",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
)
LENGTHS = (5, 1, 7, 3)
VOCAB, HIDDEN, LAYERS, CLASSES = 61, 16, 3, 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,  # ten times the usual: gradients that differ from 0
}


def _head(task: str) -> tuple[str, dict[str, Any]]:
    """The name of the class, and what its config has beside the sizes."""
    if task == "regression":
        return "BertForSequenceClassification", {"num_labels": 1}
    if task == "several":
        problem = "multi_label_classification"
        return "BertForSequenceClassification", {"num_labels": CLASSES, "problem_type": problem}
    labels = {"QuestionAnswering": 2, "MultipleChoice": 1}.get(task, CLASSES)
    return f"BertFor{task}", {"num_labels": labels}


def native(task: str, *, dropout: float = 0.0, seed: int = 0, **changes: Any) -> Any:
    """In training mode, fp64: what is computed by hand has to agree in all its digits."""
    name, own = _head(task)
    torch.manual_seed(seed)
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config = fastbert.BertConfig(**{**_SIZES, **rates, **own, **changes})
    return _random(getattr(fastbert, name)(config))


def hugging_face(task: str, *, dropout: float = 0.0, seed: int = 0, **changes: Any) -> Any:
    name, own = _head(task)
    torch.manual_seed(seed)
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config = transformers.BertConfig(**{**_SIZES, **rates, **own, **changes})
    return _random(getattr(transformers, name)(config))


def _random(model: Any) -> Any:
    """No bias 0 and no LayerNorm without an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.double().train()


def padded(task: str, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> Inputs:
    """Inputs and labels of a Hugging Face model, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, VOCAB, (rows, width), generator=g) * mask
    inputs: Inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if task == "SequenceClassification":
        inputs["labels"] = torch.randint(CLASSES, (rows,), generator=g)
    if task == "regression":
        inputs["labels"] = torch.randn(rows, generator=g, dtype=torch.float64)
    if task == "several":
        inputs["labels"] = torch.randint(2, (rows, CLASSES), generator=g).double()
    if task == "TokenClassification":
        labels = torch.randint(CLASSES, (rows, width), generator=g)
        counts = mask & (torch.rand(rows, width, generator=g) < 0.7)
        counts[0, 0] = True
        inputs["labels"] = torch.where(counts, labels, -100)
    if task == "QuestionAnswering":
        inputs["start_positions"] = torch.tensor([n // 2 for n in lengths])
        inputs["end_positions"] = torch.tensor([n - 1 for n in lengths])
    if task == "MultipleChoice":
        pairs = {name: x.view(rows // 2, 2, width) for name, x in inputs.items()}
        inputs = {**pairs, "labels": torch.randint(2, (rows // 2,), generator=g)}
    return inputs


def packed(task: str, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> Inputs:
    """The same, as a native model takes them."""
    inputs = padded(task, seed, lengths)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    if task == "MultipleChoice":
        ids, mask, inputs["num_choices"] = ids.flatten(0, 1), mask.flatten(0, 1), ids.shape[1]
    batch = PackedBatch.from_padded(ids, mask)
    if task == "TokenClassification":
        inputs["labels"] = batch.pack(inputs["labels"])
    return {"batch": batch, **inputs}


def same_weights(model: Any, other: Any) -> Any:
    """``model`` with the weights of ``other``, which has the same names."""
    model.load_state_dict(other.state_dict())
    return model


def forward_of(model: Any) -> Any:
    return lambda inputs: model(**inputs)


def gradients(model: Any) -> dict[str, Tensor]:
    """Those that the parameters have, which are then without."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=atol, msg=partial(_name, name))


def _name(name: str, message: str) -> str:
    return f"{name}: {message}"
