"""Where things are in a model: its encoder, layers and head, native or Hugging Face's; and the note
in its config of the methods that have changed its structure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastbert.finetune.methods.base import Method

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
NOTE = "finetune_methods"  # the key of config.json


def task_of(model: nn.Module) -> str:
    """One of TASKS, by the name of the model's class or of one that it derives from; else ""."""
    for kind in type(model).__mro__:
        task = kind.__name__.rpartition("For")[2]
        if task in TASKS:
            return task
    return ""


def expect_task(method: Method, model: nn.Module, tasks: tuple[str, ...] = TASKS) -> str:
    """``task_of(model)``. Raises ValueError if it is none of ``tasks``."""
    task = task_of(model)
    if task not in tasks:
        raise ValueError(
            f"{method.name}: got a {type(model).__name__}, expected a model for one of "
            f"{', '.join(tasks)}"
        )
    return task


def expect_classes(method: Method, model: nn.Module, tasks: tuple[str, ...] = TASKS) -> None:
    """Raises ValueError for a model whose answers are not one class of several."""
    task = expect_task(method, model, tasks)
    config: Any = model.config
    problem = getattr(config, "problem_type", None)
    if task == "SequenceClassification" and problem is None and config.num_labels == 1:
        problem = "regression"
    if problem not in (None, "single_label_classification"):
        raise ValueError(f"{method.name}: got a model for {problem}, expected single classes")


def encoder_layers(method: Method, model: nn.Module) -> nn.ModuleList:
    """The layers of the encoder, the lowest first.

    Raises ValueError for a model without a list of them, such as an ALBERT, which has one layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and re.search(r"(^|\.)layers?$", name):
            return module
    raise ValueError(f"{method.name}: got a {type(model).__name__}, which has no list of layers")


def expect_no_checkpointing(method: Method, model: nn.Module) -> None:
    """Raises ValueError where layers are computed again in backward, as they no longer are."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(f"{method.name}: gradient checkpointing is on, expected it off")


def word_embeddings(model: Any) -> nn.Embedding:
    """The table of word embeddings. Raises ValueError for a model without one."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()
    for name, module in model.named_modules():
        if name.endswith("word_embeddings"):
            return module
    raise ValueError(f"model: got a {type(model).__name__}, which has no word embeddings")


def is_head(model: nn.Module, name: str) -> bool:
    """True for a parameter of what stands on the encoder: poolers, and all of a task's own."""
    backbone = getattr(model, "base_model_prefix", "") or "bert"
    inside = not hasattr(model, backbone) or name.startswith(backbone + ".")
    return not inside or "pooler" in name.split(".")


def train_only(model: nn.Module, names: set[str]) -> list[str]:
    """Freeze all other parameters; returns the names of those that were not frozen before."""
    frozen = []
    for name, parameter in model.named_parameters():
        if name not in names and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def unfreeze(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def note(method: Method, model: Any) -> None:
    """Write down in the model's config that ``method`` has changed its structure, so that whoever
    loads the weights can ``parse`` the notes and ``prepare`` a model for them."""
    extra = getattr(model.config, "extra", None)
    if extra is None:  # Hugging Face's config writes whatever attributes it has
        setattr(model.config, NOTE, _noted(method, getattr(model.config, NOTE, [])))
        return
    model.config = model.config.replace(extra={**extra, NOTE: _noted(method, extra.get(NOTE, []))})


def _noted(method: Method, notes: Sequence[str]) -> list[str]:
    """With one note of the method, also where the config of a saved model has it already."""
    others = [text for text in notes if text.partition(":")[0] != method.name]
    return [*others, str(method)]
