"""Tasks: one file each, on what ``base`` says a task is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastbert.finetune.tasks.base import Task
from fastbert.finetune.tasks.choice import Choice
from fastbert.finetune.tasks.classify import Classify
from fastbert.finetune.tasks.multilabel import MultiLabel
from fastbert.finetune.tasks.pairs import Pairs
from fastbert.finetune.tasks.qa import QuestionAnswering
from fastbert.finetune.tasks.regress import Regress
from fastbert.finetune.tasks.similarity import Similarity
from fastbert.finetune.tasks.tag import Tag

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classify, Regress, Pairs, MultiLabel, Tag, QuestionAnswering, Choice, Similarity)
}
"""By name."""


def task_of(state: Mapping[str, Any]) -> Task:
    """The task whose ``state()`` it is. Raises ValueError for one that is not known."""
    name = state.get("task")
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name].from_state(state)
