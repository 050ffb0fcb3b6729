"""Fine-tuning: labelled rows and a checkpoint to a model for a task.

    results = finetune("checkpoint", "train.csv", "out", task="classify", dev="dev.csv",
                       method=LayerwiseLR(0.9) + FreeLB() + Mixout(0.7), seeds=5)
    found = evaluate(load("out/model"), "out/model", "test.csv")

The parts, and what each may rely on:

read_table    a file of one of many formats to a Table, whose rows know where they stood.
Task          what is learnt, one class a kind: which columns, labels, features, the model's class,
              predictions, scores. See ``tasks.base`` for the way of data through it.
Features      token ids of all rows, in windows, end to end.
Method        one way to fine-tune better; methods compose. See ``methods``: they serve in a loop of
              one's own (``attach``) and in the Trainer of transformers (``MethodCallback``) too.
Setting       epochs, rates, batches; what is left open follows the size of the data.
Trainer       one seed, resumable bit by bit.
finetune      all of it, of several seeds; the best model as a Hugging Face folder.
evaluate      what a model says of rows, float or quantised.
"""

from __future__ import annotations

from typing import Any

from fastbert.finetune import methods
from fastbert.finetune.columns import guess_columns
from fastbert.finetune.evaluate import Evaluation, Examiner, evaluate
from fastbert.finetune.features import Features
from fastbert.finetune.methods import *  # noqa: F403
from fastbert.finetune.methods import __all__ as _methods
from fastbert.finetune.metrics import Score
from fastbert.finetune.reading import BadRows, Table, read_table
from fastbert.finetune.run import finetune
from fastbert.finetune.saved import load
from fastbert.finetune.sentence_encoder import SentenceEncoder
from fastbert.finetune.setting import Setting
from fastbert.finetune.tasks import TASKS, Task
from fastbert.finetune.trainer import Trainer
from fastbert.train.errors import NotFinite

__all__ = [  # noqa: PLE0604
    "TASKS",
    "BadRows",
    "Evaluation",
    "Examiner",
    "Features",
    "NotFinite",
    "Score",
    "SentenceEncoder",
    "Setting",
    "Table",
    "Task",
    "Trainer",
    "evaluate",
    "finetune",
    "guess_columns",
    "load",
    "read_table",
    *_methods,
]


def __getattr__(name: str) -> Any:
    if name == "MethodCallback":  # imports transformers
        return methods.MethodCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
