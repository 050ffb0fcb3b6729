"""The task models as data: what each head reads, which modules it is made of, what it returns.

A step of a head is the path of a module in the task model, or a function. Heads run on packed rows,
so only modules that map each row by itself may stand in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.hf.families import FAMILIES, Family, known_class

Step = str | Callable[[torch.Tensor], torch.Tensor]


class Task(NamedTuple):
    """One task model of one family.

    kind: the function of ``heads.py`` that computes loss and outputs.
    output: class name of what it returns.
    takes: "tokens" (T, H), "pooled" (B, H), "first" (B, H) the first token of each sequence, or
        "sequence" (B, 1, H), the same for a head that takes ``[:, 0]`` itself.
    head: the steps from there to the logits.
    transform, decoder: for a language model, the steps before the vocabulary, and its Linear.
    second: steps from pooled to the sentence-pair logits, and the names of those logits and labels.
    """

    kind: str
    output: str
    takes: str
    head: tuple[Step, ...]
    transform: tuple[Step, ...] = ()
    decoder: str = ""
    second: tuple[tuple[Step, ...], str, str] = ((), "", "")


_TOKEN_CLASSIFICATION = Task(
    "token_classification", "TokenClassifierOutput", "tokens", ("dropout", "classifier")
)
_QUESTION_ANSWERING = Task(
    "question_answering", "QuestionAnsweringModelOutput", "tokens", ("qa_outputs",)
)
_MULTIPLE_CHOICE = Task(
    "multiple_choice", "MultipleChoiceModelOutput", "pooled", ("dropout", "classifier")
)
_SEQUENCE_CLASSIFICATION = Task(
    "sequence_classification", "SequenceClassifierOutput", "pooled", ("dropout", "classifier")
)
_DISTILBERT_CLASSIFIER = ("pre_classifier", F.relu, "dropout", "classifier")


def _masked_lm(head: tuple[Step, ...], transform: tuple[Step, ...], decoder: str) -> Task:
    return Task("masked_lm", "MaskedLMOutput", "tokens", head, transform, decoder)


_BERT = {
    "BertForMaskedLM": _masked_lm(
        ("cls",), ("cls.predictions.transform",), "cls.predictions.decoder"
    ),
    "BertForPreTraining": Task(
        "pretraining",
        "BertForPreTrainingOutput",
        "tokens",
        ("cls.predictions",),
        ("cls.predictions.transform",),
        "cls.predictions.decoder",
        (("cls.seq_relationship",), "seq_relationship_logits", "next_sentence_label"),
    ),
    "BertForNextSentencePrediction": Task(
        "next_sentence", "NextSentencePredictorOutput", "pooled", ("cls",)
    ),
    "BertForSequenceClassification": _SEQUENCE_CLASSIFICATION,
    "BertForMultipleChoice": _MULTIPLE_CHOICE,
    "BertForTokenClassification": _TOKEN_CLASSIFICATION,
    "BertForQuestionAnswering": _QUESTION_ANSWERING,
}


def _roberta(classes: str) -> dict[str, Task]:
    transform = ("lm_head.dense", F.gelu, "lm_head.layer_norm")
    return {
        f"{classes}ForMaskedLM": _masked_lm(("lm_head",), transform, "lm_head.decoder"),
        f"{classes}ForSequenceClassification": _SEQUENCE_CLASSIFICATION._replace(
            takes="sequence", head=("classifier",)
        ),
        f"{classes}ForMultipleChoice": _MULTIPLE_CHOICE,
        f"{classes}ForTokenClassification": _TOKEN_CLASSIFICATION,
        f"{classes}ForQuestionAnswering": _QUESTION_ANSWERING,
    }


_DISTILBERT_TRANSFORM = ("vocab_transform", "activation", "vocab_layer_norm")
_DISTILBERT = {
    "DistilBertForMaskedLM": _masked_lm(
        (*_DISTILBERT_TRANSFORM, "vocab_projector"), _DISTILBERT_TRANSFORM, "vocab_projector"
    ),
    "DistilBertForSequenceClassification": _SEQUENCE_CLASSIFICATION._replace(
        takes="first", head=_DISTILBERT_CLASSIFIER
    ),
    "DistilBertForMultipleChoice": _MULTIPLE_CHOICE._replace(
        takes="first", head=_DISTILBERT_CLASSIFIER
    ),
    "DistilBertForTokenClassification": _TOKEN_CLASSIFICATION,
    "DistilBertForQuestionAnswering": _QUESTION_ANSWERING._replace(head=("dropout", "qa_outputs")),
}
_ELECTRA = {
    "ElectraForMaskedLM": _masked_lm(
        ("generator_predictions", "generator_lm_head"),
        ("generator_predictions",),
        "generator_lm_head",
    ),
    "ElectraForPreTraining": Task(
        "replaced_tokens", "ElectraForPreTrainingOutput", "tokens", ("discriminator_predictions",)
    ),
    "ElectraForSequenceClassification": _SEQUENCE_CLASSIFICATION._replace(
        takes="sequence", head=("classifier",)
    ),
    "ElectraForMultipleChoice": _MULTIPLE_CHOICE._replace(
        takes="sequence", head=("sequence_summary", "classifier")
    ),
    "ElectraForTokenClassification": _TOKEN_CLASSIFICATION,
    "ElectraForQuestionAnswering": _QUESTION_ANSWERING,
}
_ALBERT_TRANSFORM = ("predictions.dense", "predictions.activation", "predictions.LayerNorm")
_ALBERT = {
    "AlbertForMaskedLM": _masked_lm(("predictions",), _ALBERT_TRANSFORM, "predictions.decoder"),
    "AlbertForPreTraining": Task(
        "pretraining",
        "AlbertForPreTrainingOutput",
        "tokens",
        ("predictions",),
        _ALBERT_TRANSFORM,
        "predictions.decoder",
        (("sop_classifier",), "sop_logits", "sentence_order_label"),
    ),
    "AlbertForSequenceClassification": _SEQUENCE_CLASSIFICATION,
    "AlbertForMultipleChoice": _MULTIPLE_CHOICE,
    "AlbertForTokenClassification": _TOKEN_CLASSIFICATION,
    "AlbertForQuestionAnswering": _QUESTION_ANSWERING,
}
_BY_FAMILY = {
    "bert": _BERT,
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "electra": _ELECTRA,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}
TASKS: dict[str, tuple[Family, Task]] = {
    f"{FAMILIES[family].module}.{name}": (FAMILIES[family], task)
    for family, tasks in _BY_FAMILY.items()
    for name, task in tasks.items()
}


def task_of(module: nn.Module) -> tuple[Family, Task] | None:
    """The family and task of a task model, None for anything else."""
    name = known_class(module)
    return None if name is None else TASKS.get(name)


def paths(steps: tuple[Step, ...]) -> Iterator[tuple[str, ...]]:
    """The module paths among ``steps``."""
    for step in steps:
        if isinstance(step, str):
            yield tuple(step.split("."))
