"""Methods in loops that are not ours: a plain one, and the Trainer of transformers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.finetune.methods import (
    FreeLB,
    LayerwiseLR,
    Method,
    MethodCallback,
    Mixout,
    attach,
    parse,
    scale_steps,
)

from ._models import CLASSES, TASKS, assert_same, gradients, hugging_face, native, packed, padded

Tensor = torch.Tensor
KINDS = ("native", "plain", "accelerated")


def made(task: str, kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    if kind == "native":
        return native(task, **changes), packed(task)
    model = hugging_face(task, **changes)
    if kind == "accelerated":
        fastbert.accelerate(model, strict=True)
    return model, padded(task)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_the_model_returns_the_methods_loss(task: str, kind: str) -> None:
    model, inputs = made(task, kind, dropout=0.2)
    method = FreeLB(steps=2) + Mixout(0.5)
    method.prepare(model)
    torch.manual_seed(3)
    expected = method.loss(lambda inputs: model(**inputs), inputs, model).loss
    expected.backward()
    theirs = gradients(model)
    handle = attach(model, method)
    torch.manual_seed(3)
    loss = model(**inputs).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert_same(gradients(model), theirs)
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_eval_and_no_grad_are_plain_and_removal_leaves_nothing(kind: str) -> None:
    model, inputs = made("SequenceClassification", kind)
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    plain = model(**inputs).loss
    handle = attach(model, FreeLB(magnitude=5.0, epsilon=9.0))
    assert inspect.signature(model.forward) == signature
    assert not torch.equal(model(**inputs).loss, plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, plain)
    assert torch.equal(model.eval()(**inputs).loss, plain)
    handle.remove()
    handle.remove()
    assert torch.equal(model.train()(**inputs).loss, plain)
    assert model.__dict__.keys() == before.keys()
    assert model.__dict__.get("forward") is before.get("forward")


def test_positional_inputs_find_their_names() -> None:
    model, inputs = made("SequenceClassification", "plain")
    handle = attach(model, FreeLB(magnitude=0.0))
    by_name = model(**inputs).loss
    by_place = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss
    assert torch.equal(by_name, by_place)
    handle.remove()


def test_tuples_and_missing_labels_are_named() -> None:
    model, inputs = made("SequenceClassification", "plain")
    attach(model, FreeLB())
    with pytest.raises(ValueError, match="freelb: got a tuple from the model, expected return_di"):
        model(**inputs, return_dict=False)
    del inputs["labels"]
    with pytest.raises(ValueError, match="freelb: got an output without a loss, expected labels"):
        model(**inputs)


# Adam divides a gradient that is 0 but for its rounding by as little: eps keeps such steps small.
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.AdamW, eps=1e-3)])
def test_scaled_steps_are_learning_rates(optimizer: Any) -> None:
    """Three steps equal those of an optimiser with a group for each rate."""
    rates = {"bert.pooler.dense.weight": 0.5, "classifier.bias": 0.0}
    results = []
    for grouped in (True, False):
        model, inputs = made("SequenceClassification", "native")
        named = dict(model.named_parameters())
        if grouped:
            groups = [{"params": [p], "lr": 0.1 * rates.get(n, 1.0)} for n, p in named.items()]
            chosen, handles = optimizer(groups, lr=0.1), []
        else:
            chosen = optimizer(named.values(), lr=0.1)
            handles = scale_steps(chosen, model, rates)
        for _ in range(3):
            model(**inputs).loss.backward()
            chosen.step()
            chosen.zero_grad()
        for handle in handles:
            handle.remove()
        results.append({name: p.detach() for name, p in named.items()})
    assert_same(results[1], results[0])


@dataclass
class Watch(Method):
    """Notes what is called, and with what."""

    name = "watch"

    def __post_init__(self) -> None:
        self.calls: list[Any] = []

    def prepare(self, model: Any) -> None:
        self.calls.append("prepare")

    def loss(self, forward: Any, inputs: Any, model: Any) -> Any:
        self.calls.append("loss")
        return super().loss(forward, inputs, model)

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.calls.append((step, total))

    def finish(self, model: Any) -> None:
        self.calls.append("finish")


class Rows(torch.utils.data.Dataset):
    """Eight padded rows for a classifier."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(i)
        length = 3 + i % 3
        mask = (torch.arange(6) < length).long()
        ids = torch.randint(1, 61, (6,), generator=g) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % CLASSES)}


def trainer(folder: Path, model: Any, *methods: Method, **options: Any) -> transformers.Trainer:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**given, **options}),
        train_dataset=Rows(),
        callbacks=[MethodCallback(method) for method in methods],
    )


def test_the_trainer_calls_in_order(tmp_path: Path) -> None:
    method = Watch()
    run = trainer(tmp_path, hugging_face("SequenceClassification"), method)
    assert method.calls == ["prepare"]
    run.train()
    steps = [call for step in range(1, 5) for call in ("loss", (step, 4))]
    assert method.calls == ["prepare", *steps, "finish"]
    assert "forward" not in run.model.__dict__


@dataclass
class Record(Method):
    """Keeps the inputs of each update, and what torch's generator was before it."""

    name = "record"
    order = 99

    def __post_init__(self) -> None:
        self.seen: list[Any] = []

    def loss(self, forward: Any, inputs: Any, model: Any) -> Any:
        self.seen.append((inputs, torch.get_rng_state()))
        return forward(inputs)


@pytest.mark.parametrize("kind", ["plain", "accelerated"])
def test_the_trainer_follows_the_method(kind: str, tmp_path: Path) -> None:
    """One update by SGD is that of the same method in a loop by hand."""
    method, record = FreeLB(steps=2) + LayerwiseLR(0.5), Record()
    model, _ = made("SequenceClassification", kind)
    run = trainer(tmp_path, model, method + record, optim="sgd", max_steps=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.train()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}

    again, _ = made("SequenceClassification", kind)
    again.load_state_dict(before)
    ((inputs, state),), rates = record.seen, method.rates(again)
    torch.set_rng_state(state)
    method.loss(lambda inputs: again(**inputs), inputs, again).loss.backward()
    expected = {
        name: before[name] - 1e-2 * rates.get(name, 1.0) * p.grad
        for name, p in again.named_parameters()
    }
    assert_same(after, expected)


@pytest.mark.parametrize("kind", ["plain", "accelerated"])
@pytest.mark.parametrize(
    "text",
    [
        "freelb+layerwise-lr:.8+mixout:.5",
        "smart+scalar-mix+label-smoothing",
        "adapters:4+r-drop",
        "lora:2+cls-norm",
        "reinit:1+class-weights:1/2/1",
    ],
)
def test_the_trainer_trains_with_it(text: str, kind: str, tmp_path: Path) -> None:
    model, _ = made("SequenceClassification", kind, dropout=0.1)
    method = parse(text)
    run = trainer(tmp_path, model, method, num_train_epochs=8)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = run.evaluate(Rows())["eval_loss"]
    run.train()
    assert run.evaluate(Rows())["eval_loss"] < loss
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)
    assert all(p.requires_grad for p in model.parameters())
    run.save_model(str(tmp_path / "out"))
    notes = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    kept = [str(m) for m in method.methods if m.structural]
    assert notes.get("finetune_methods", []) == kept


def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    """The optimiser's state is as without a method: layer-wise rates fit any checkpoint."""
    results = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        model = hugging_face("SequenceClassification")
        run = trainer(folder, model, LayerwiseLR(0.5), **options)
        if stop:
            run.args.max_steps = 2
            run.train()
            model = hugging_face("SequenceClassification")
            run = trainer(folder, model, LayerwiseLR(0.5), **options)
            run.train(resume_from_checkpoint=True)
        else:
            run.train()
        results.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(results[1], results[0])


def test_a_trainer_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    method = LayerwiseLR(0.5)
    run = trainer(tmp_path, hugging_face("SequenceClassification"))
    run.add_callback(MethodCallback(method))
    with pytest.raises(ValueError, match="got a model that it has not prepared"):
        run.train()
    run = trainer(tmp_path, hugging_face("SequenceClassification"), method)
    run.train()
    with pytest.raises(ValueError, match="expected one train\\(\\) of a Trainer"):
        run.train()


def test_a_loss_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    options = {"label_smoothing_factor": 0.1}
    run = trainer(tmp_path, hugging_face("SequenceClassification"), FreeLB(), **options)
    with pytest.raises(ValueError, match="freelb: got an output without a loss, expected labels"):
        run.train()


def test_transformers_is_imported_by_those_who_use_it_only() -> None:
    code = (
        "import sys, fastbert.finetune.methods as m; "
        "assert not {'transformers', 'peft'} & sys.modules.keys(); "
        "m.MethodCallback; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
