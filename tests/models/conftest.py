"""Random tiny BERTs, ours and transformers' with the same weights, and the parity criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

import fastbert

HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,  # ten times the usual: attention not uniform, GELU not linear
}


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_config() -> Callable[..., fastbert.BertConfig]:
    """A function of the fields that differ."""
    return lambda **changes: fastbert.BertConfig(**{**TINY, **changes})


@pytest.fixture
def hf_model() -> Callable[..., Any]:
    """A function (head, **config fields) -> transformers' model, all parameters random, in eval."""

    def make(head: str, **changes: Any) -> Any:
        config = transformers.BertConfig(**{**TINY, **changes}, attn_implementation="eager")
        model = getattr(transformers, head)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    return make


@pytest.fixture
def native() -> Callable[..., Any]:
    """A function of transformers' model -> ours with the same config and weights, in eval."""

    def make(hf: Any) -> Any:
        config = fastbert.BertConfig.from_dict(hf.config.to_dict())
        model = getattr(fastbert, type(hf).__name__)(config)
        model.load_state_dict(hf.state_dict())  # strict: the same keys
        return model.to(next(hf.parameters()).dtype).eval()

    return make


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """A function (head, lengths) -> padded inputs and labels for that head."""

    def make(head: str, lengths: tuple[int, ...] = (11, 1, 16, 7)) -> dict[str, torch.Tensor]:
        rows, width = len(lengths), max(lengths)
        mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        made = {
            "input_ids": torch.randint(1, TINY["vocab_size"], (rows, width)) * mask,
            "attention_mask": mask.long(),
            "token_type_ids": torch.randint(0, 2, (rows, width)) * mask,
        }
        masked = torch.where(mask & (torch.rand(rows, width) < 0.4), made["input_ids"], -100)
        masked[0, 0] = 5
        if head in ("BertForMaskedLM", "BertForPreTraining"):
            made["labels"] = masked
        if head == "BertForPreTraining":
            made["next_sentence_label"] = torch.randint(0, 2, (rows,))
        if head in ("BertForNextSentencePrediction", "BertForSequenceClassification"):
            made["labels"] = torch.randint(0, 2, (rows,))
        if head == "BertForTokenClassification":
            made["labels"] = torch.where(masked != -100, masked % 2, -100)
        if head == "BertForQuestionAnswering":
            made["start_positions"] = torch.tensor([n // 2 for n in lengths])
            made["end_positions"] = torch.tensor([n - 1 for n in lengths])
        if head == "BertForMultipleChoice":
            pairs = {name: x.view(rows // 2, 2, width) for name, x in made.items()}
            made = {**pairs, "labels": torch.randint(0, 2, (rows // 2,))}
        return made

    return make


@pytest.fixture
def assert_as_exact() -> Callable[..., None]:
    """The one criterion: err(ours, fp64) <= 2 err(transformers in our dtype, fp64) + atol."""

    def check(ours: Any, theirs: Any, exact: Any, name: str = "", atol: float = 2e-6) -> None:
        assert ours.shape == exact.shape, name
        error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
        allowed = (theirs.double() - exact).abs().max().item() if exact.numel() else 0.0
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        assert error <= 2 * allowed + atol * scale, f"{name}: {error:.2e} against {allowed:.2e}"

    return check
