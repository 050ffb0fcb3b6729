"""Models to fine-tune, and models that were fine-tuned, as folders.

A fine-tuned model is a Hugging Face folder with one file more, ``task.json``: what ``fastbert
evaluate`` and ``fastbert predict`` need to know to read data as in training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert import models
from fastbert.atomic import replacing
from fastbert.config import BertConfig
from fastbert.finetune.methods import parse
from fastbert.finetune.methods.structure import NOTE
from fastbert.finetune.sentence_encoder import SentenceEncoder
from fastbert.finetune.setting import Setting
from fastbert.finetune.tasks import TASKS, Task, task_of
from fastbert.models.bert import BertPreTrained
from fastbert.models.checkpoint import load_config, read_weights
from fastbert.train.rng import seed_all

TASK = "task.json"

_LONGEST = 10**6  # transformers writes 10^30 where a tokenizer has no longest length


class Reading(NamedTuple):
    """How texts become sequences: ``Task.encode``'s arguments."""

    max_length: int
    stride: int | None


def text_folder(folder: str | Path) -> Path:
    """Where config.json is: in a folder of sentence-transformers it may be in one of its own."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return folder / modules[0]["path"]
    return folder


def longest(folder: Path, config: BertConfig) -> int:
    """Tokens of the longest sequence that the model in ``folder`` reads."""
    limits = [config.max_position_embeddings]
    for name, key in (
        ("tokenizer_config.json", "model_max_length"),
        ("sentence_bert_config.json", "max_seq_length"),
    ):
        path = folder / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get(key)
            if isinstance(value, int) and 0 < value < _LONGEST:
                limits.append(value)
    return min(limits)


def start(
    folder: Path, task: Task, setting: Setting, seed: int, *, new_head: bool = False
) -> BertPreTrained:
    """The checkpoint in ``folder`` as a model for ``task``.

    Its head is kept if it is one for the very same labels, unless ``new_head``; a new one is drawn
    from ``seed``.
    """
    config = load_config(folder)
    if config.extra.get(NOTE):
        raise ValueError(
            f"model: {folder} was trained with {', '.join(config.extra[NOTE])}, which leaves it "
            "parts that a plain model does not have; train on from a plain one"
        )
    seed_all(seed)
    changes = {**task.config(), **setting.rates()}
    same = (config.architectures or ("",))[0] == task.model.__name__ and (
        task.model is SentenceEncoder or config.id2label == changes.get("id2label")
    )
    return task.model.from_pretrained(
        folder, dtype=torch.float32, new_head=new_head or not same, **changes
    )


def save(
    model: BertPreTrained, task: Task, reading: Reading, columns: dict[str, Any], folder: Path
) -> None:
    """Write a trained model as a folder that ``load`` and Hugging Face read."""
    if isinstance(model, SentenceEncoder):
        model.save_pretrained(folder, max_length=reading.max_length)
    else:
        model.save_pretrained(folder)
    facts = {**reading._asdict(), "columns": columns, "state": task.state()}
    with replacing(folder / TASK) as (path,):
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> nn.Module:
    """The model of a folder that ``finetune`` wrote, or of any that ``from_pretrained`` reads, with
    what its methods added; in eval mode, on CPU."""
    folder = text_folder(folder)
    if _is_sentence_encoder(folder):
        return SentenceEncoder.from_pretrained(folder)
    config = load_config(folder)
    name = (config.architectures or ("BertModel",))[0]
    kind = getattr(models, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BertPreTrained)):
        raise ValueError(f"{folder}: holds a {name}, expected one of fastbert's models")
    notes = config.extra.get(NOTE, [])
    if not notes:
        return kind.from_pretrained(folder)
    extra = {key: value for key, value in config.extra.items() if key != NOTE}
    model = kind(config.replace(extra=extra))
    parse("+".join(notes)).prepare(model)
    path, tensors = read_weights(folder)
    # Names that are tied are saved once.
    found = model.load_state_dict(tensors, strict=False)
    missing = sorted(set(found.missing_keys) - set(model.tied))
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{path}: does not fit {name} with {'+'.join(notes)}: missing {missing}, unexpected "
            f"{found.unexpected_keys}"
        )
    model.source_folder = folder
    return model.eval()


def load_task(folder: str | Path, name: str | None = None) -> tuple[Task, Reading, dict[str, Any]]:
    """(task, how it reads texts, columns) of a fine-tuned model's folder.

    name: of the task, for a model that something else has trained: its labels are those of its
    config. Raises ValueError where neither is known.
    """
    folder = text_folder(folder)
    path = folder / TASK
    if path.is_file():
        facts = json.loads(path.read_text(encoding="utf-8"))
        task = task_of(facts["state"])
        if name is not None and name != task.name:
            raise ValueError(f"task: got {name!r}, but {folder} was trained for {task.name!r}")
        return task, Reading(facts["max_length"], facts["stride"]), facts["columns"]
    if name is None:
        raise ValueError(
            f"task: {folder} holds no {TASK}, as `fastbert finetune` writes it; expected one of "
            f"{', '.join(TASKS)}"
        )
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    config = load_config(folder)
    return TASKS[name].from_config(config), Reading(longest(folder, config), Setting.stride), {}


def copy_task(source: Path, folder: Path) -> None:
    """Copy ``task.json`` beside a model that was made of the one in ``source``, such as a quantised
    one; without one nothing is done."""
    path = text_folder(source) / TASK
    if path.is_file():
        with replacing(folder / TASK) as (temporary,):
            shutil.copyfile(path, temporary)


def _is_sentence_encoder(folder: Path) -> bool:
    path = folder / TASK
    if not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["state"]["task"] == "similarity"
