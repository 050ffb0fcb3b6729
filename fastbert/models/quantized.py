"""Native models on a quantised encoder: what ``fastbert.quantize`` asks of them and makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert import models
from fastbert.config import BertConfig
from fastbert.models.bert import BertModel, BertPreTrained
from fastbert.nn import Pooler
from fastbert.nn.layer import EmbeddingParts, LayerParts
from fastbert.packed import PackedBatch

Tensor = torch.Tensor
Encoder = Callable[[PackedBatch, bool], tuple[Tensor, list[Tensor] | None]]
"""(batch, whether all hidden states are wanted) -> the last one (T, H), and all or None."""

MODEL_NAMES = tuple(name for name in models.__all__ if name != "BertPreTrained")
# Task model -> what its head is called in saved models, the rows that it takes, and its Linear.
_HEADS = {
    "BertForNextSentencePrediction": ("next_sentence", "pooled", "cls.seq_relationship"),
    "BertForSequenceClassification": ("sequence_classification", "pooled", "classifier"),
    "BertForTokenClassification": ("token_classification", "tokens", "classifier"),
    "BertForQuestionAnswering": ("question_answering", "tokens", "qa_outputs"),
    "BertForMultipleChoice": ("multiple_choice", "pooled", "classifier"),
}


class QuantizedBert(BertModel):
    """BertModel with an encoder that computes everything up to the last hidden state."""

    def __init__(self, config: BertConfig, encoder: Encoder, pooler: Pooler | None) -> None:
        BertPreTrained.__init__(self, config)
        self.quantized_encoder = encoder
        self.pooler = pooler

    def encode(
        self,
        batch: PackedBatch,
        want_hidden: bool,
        want_attentions: bool,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor] | None, list[Tensor] | None]:
        if want_attentions:
            raise ValueError("output_attentions: a quantised model does not keep its attentions")
        x, hidden = self.quantized_encoder(batch, want_hidden)
        return x if rows is None else x[rows], hidden, None


class NativeSource:
    """A native model as ``fastbert.quantize`` reads it."""

    library = "fastbert"

    def __init__(self, model: BertPreTrained) -> None:
        self.model = model
        self.bert: Any = model if isinstance(model, BertModel) else model.bert

    @property
    def folder(self) -> Path | None:
        """The folder that the model came from."""
        return self.model.source_folder

    def parts(self) -> tuple[EmbeddingParts, list[LayerParts]]:
        """The modules of the encoder, layers in the order they run."""
        tables = self.bert.embeddings
        embedding = EmbeddingParts(
            word=tables.word_embeddings,
            position=tables.position_embeddings,
            token_type=tables.token_type_embeddings,
            norm=tables.LayerNorm,
            dropout=None,
        )
        layers = [
            LayerParts(
                query=layer.attention.self.query,
                key=layer.attention.self.key,
                value=layer.attention.self.value,
                attention_output=layer.attention.output.dense,
                attention_norm=layer.attention.output.LayerNorm,
                up=layer.intermediate.dense,
                down=layer.output.dense,
                output_norm=layer.output.LayerNorm,
                head_dim=layer.head_dim,
                activation=layer.activation,
            )
            for layer in self.bert.encoder.layer
        ]
        return embedding, layers

    def twin(self, encoder: Encoder) -> BertPreTrained:
        """A copy of the model's heads on ``encoder``, in fp32; its encoder is not copied."""
        return _on(self.model, encoder).float()

    def facts(self) -> dict[str, Any]:
        """What a saved model says of the model beside its weights."""
        prefix = "" if self.model is self.bert else "bert."
        pooler = None if self.bert.pooler is None else [f"{prefix}pooler.dense", "tanh"]
        head: dict[str, Any] = {"task": None, "takes": None, "steps": None, "pooler": pooler}
        name = type(self.model).__name__
        if name in _HEADS:
            task, takes, linear = _HEADS[name]
            head.update(task=task, takes=takes, steps=[[linear, "none"]])
        return {"class": name, "family": "bert", "position_offset": 0, "head": head}

    def config_json(self) -> str:
        config = self.model.config.replace(architectures=(type(self.model).__name__,))
        return config.to_json()


def _on(model: BertPreTrained, encoder: Encoder) -> BertPreTrained:
    bert: Any = model if isinstance(model, BertModel) else model.bert
    quantized = QuantizedBert(bert.config, encoder, copy.deepcopy(bert.pooler))
    # What the memo holds is not copied: the encoder stays behind.
    return copy.deepcopy(model, {id(bert): quantized})


def rebuild(
    facts: Mapping[str, Any], config_json: str, encoder: Encoder, has_pooler: bool
) -> nn.Module:
    """A model on ``encoder``, its heads on the meta device, to be filled.

    facts: as NativeSource.facts() gave them.  Raises ValueError for a class that is none of ours.
    """
    class_name = facts["class"]
    if class_name not in MODEL_NAMES:
        raise ValueError(f"class: got {class_name!r}, expected one of {', '.join(MODEL_NAMES)}")
    cls = getattr(models, class_name)
    config = BertConfig.from_dict(json.loads(config_json))
    with torch.device("meta"):
        model = cls(config)
    bert: Any = model if isinstance(model, BertModel) else model.bert
    if not has_pooler:
        bert.pooler = None
    return _on(model, encoder)
