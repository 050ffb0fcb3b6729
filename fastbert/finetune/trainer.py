"""Trainer: one model, one seed, from its start or from where it was stopped.

The folder of a run holds

    log.jsonl              a line for each look at the training, and for each evaluation
    checkpoints/           see ``fastbert.train.checkpoint``
    method-*.safetensors   what a method keeps from step to step, as of the last checkpoint
    best.safetensors       the weights of the best evaluation so far

Devices, mixed precision and several processes are those of Hugging Face accelerate; ranks never see
the same row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastbert.atomic import replacing
from fastbert.data import TokenBatches
from fastbert.finetune.data import Labelled
from fastbert.finetune.inference import run_model, to_device
from fastbert.finetune.methods import Method
from fastbert.finetune.metrics import Score
from fastbert.finetune.setting import Setting
from fastbert.finetune.tasks import Task
from fastbert.models.bert import BertPreTrained
from fastbert.nn.heads import IGNORED
from fastbert.train import AdamW, checkpoint, param_groups
from fastbert.train.errors import NotFinite
from fastbert.train.logging import Log
from fastbert.train.processes import broken, mean, prepare, summed
from fastbert.train.rng import seed_all
from fastbert.train.schedules import linear

Tensor = torch.Tensor
Noted = dict[str, Any]

CHECKPOINTS, BEST, METHOD = "checkpoints", "best", "method"
_LOOKS = 20  # lines of the log in an epoch


class Trainer:
    """Trains ``model`` with ``method`` on ``train`` and looks at ``dev``.

    model: prepared by the method.  setting: with nothing left open (``Setting.for_data``).
    folder: of the run, which exists.  accelerator: of Hugging Face accelerate.
    """

    def __init__(
        self,
        model: BertPreTrained,
        task: Task,
        method: Method,
        train: Labelled,
        dev: Labelled,
        setting: Setting,
        folder: Path,
        accelerator: Any,
        seed: int,
    ) -> None:
        assert setting.epochs is not None and setting.learning_rate is not None
        self.task, self.method, self.train, self.dev = task, method, train, dev
        self.setting, self.folder, self.accelerator = setting, folder, accelerator
        self.epochs, self.learning_rate = setting.epochs, setting.learning_rate
        self.model: BertPreTrained = model.to(accelerator.device).train()
        optimizer = AdamW(
            _scaled(self.model, setting.weight_decay, method.rates(self.model)),
            setting.learning_rate,
            weight_decay=setting.weight_decay,
            bias_correction=setting.bias_correction,
            max_grad_norm=setting.max_grad_norm,
        )
        self.wrapped, self.optimizer = prepare(accelerator, self.model, optimizer)
        self.batches = self._new_batches(seed)
        self._plan_updates(seed)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.best: float | None = None
        self.best_step = 0
        self._without_better = 0
        self.log = Log(
            folder, setting.tracker, active=accelerator.is_main_process,
            settings={"task": task.name, "method": str(method), "seed": seed, **setting.to_dict()},
        )  # fmt: skip
        seed_all(seed, accelerator.process_index)

    # --- how many updates there are -----------------------------------------------------------

    def _new_batches(self, seed: int) -> TokenBatches:
        lengths = self.train.features.lengths
        setting = self.setting
        wanted = setting.batch * float(lengths.mean()) / self.accelerator.num_processes
        self.parts = max(1, round(wanted / setting.batch_tokens))
        at_once = max(math.ceil(wanted / self.parts), int(lengths.max()))
        # Rows are not sorted by length: nothing is padded, and batches stay random.
        return TokenBatches(
            lengths, at_once, seed=seed, bucket=1,
            rank=self.accelerator.process_index, world_size=self.accelerator.num_processes,
        )  # fmt: skip

    def _plan_updates(self, seed: int) -> None:
        """``ends``: the update with which each epoch ends; ``looks``: those behind which the
        development rows are looked at."""
        counting = self._new_batches(seed)
        self.ends, self.looks = [], set()
        end = 0
        for epoch in range(self.epochs):
            counting.epoch = epoch
            updates = math.ceil(len(counting) / self.parts)
            for look in range(1, self.setting.evaluations + 1):
                self.looks.add(end + max(1, round(look * updates / self.setting.evaluations)))
            end += updates
            self.ends.append(end)

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    @property
    def part_done(self) -> float:
        """0 at the beginning of the run, 1 at its end."""
        return self.step / self.total_steps

    def _rate(self) -> float:
        """Of the update that comes: up through the warm-up, then down to 0 behind the last."""
        warmup = self.setting.warmup * self.total_steps
        return self.learning_rate * linear(self.step + 1, warmup, self.total_steps + 1)

    # --- training -----------------------------------------------------------------------------

    def run(self, until: float = 1.0) -> Iterator[Noted]:
        """Train until this part of the whole is done. What is yielded is in the log too.

        Raises NotFinite.
        """
        self.log.begin(self.step)
        try:
            yield from self._run(until)
        finally:
            self.log.close()

    def _run(self, until: float) -> Iterator[Noted]:
        last = math.ceil(until * self.total_steps)
        look_every = max(1, self.ends[0] // _LOOKS)
        losses: list[Tensor] = []
        batches: Iterator[list[dict[str, Any]]] = iter(())
        while self.step < last and not self._has_lost_patience():
            began = time.perf_counter()
            parts = [part for part in (next(batches, None) for _ in range(self.parts)) if part]
            if not parts:
                batches = self._epoch()
                continue
            losses.append(self.update(parts))
            look = self.step % look_every == 0 or self.step in self.looks or self.step == last
            if look:  # on a GPU nobody waits for the loss of every step
                loss = torch.stack(losses).mean().item()
                losses.clear()
                if not math.isfinite(loss):
                    raise self._not_finite(f"the loss is {loss}")
            self.seconds += time.perf_counter() - began
            keeps = self.step in self.looks or self.step == last
            if keeps and broken(self.accelerator, self.model):  # neither a best nor a checkpoint
                raise self._not_finite("parameters are no numbers any more")
            if look:
                yield self._noted("train", loss=loss, lr=self._rate())
            if self.step in self.looks:
                yield self._noted("dev", **self._look())
            if keeps:
                self.save()

    def _epoch(self) -> Iterator[list[dict[str, Any]]]:
        """The examples of each batch that is left of the epoch."""
        features = self.train.features
        for index in self.batches:
            yield [features[i] for i in index.tolist()]

    def update(self, parts: list[list[dict[str, Any]]]) -> Tensor:
        """One step on the accumulated batches: its loss, a mean over all that is labelled."""
        for group in self.optimizer.param_groups:
            rate = self._rate() * group["lr_scale"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.model.train()
        collated = [self.task.collate(part) for part in parts]
        counts = [_count(inputs) for inputs in collated]
        (total,) = summed(self.accelerator, [sum(counts)])
        losses = []
        for number, (inputs, count) in enumerate(zip(collated, counts, strict=True)):
            # DDP takes the mean of the ranks' gradients, where the sum over all is wanted.
            weight = count * self.accelerator.num_processes / max(1, total)
            losses.append(weight * self._gradients(inputs, weight, number == len(parts) - 1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.method.after_step(self.model, self.step, self.total_steps)
        self.tokens += summed(self.accelerator, [sum(x["batch"].num_tokens for x in collated)])[0]
        for _ in parts:
            self.batches.advance()
        return mean(self.accelerator, losses)

    def _gradients(self, inputs: dict[str, Any], weight: float, last: bool) -> Tensor:
        inputs = to_device(inputs, self.accelerator.device)

        def forward(changed: dict[str, Any]) -> Any:
            with self.accelerator.autocast():
                return self.wrapped(**changed)

        def backward(value: Tensor) -> None:
            self.accelerator.backward(value * weight)

        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            output = self.method.gradients(forward, inputs, backward, self.model)
        return output.loss.detach().float()

    # --- looking at it ------------------------------------------------------------------------

    def scores(self, data: Labelled) -> dict[str, Score]:
        """Of the model as it is now."""
        return self.task.scores(self.predictions(data), data.table)

    def predictions(self, data: Labelled) -> list[Any]:
        """One for each row of ``data``, of the model as it is now."""
        outputs = run_model(
            self.model, self.task, data.features, self.setting.batch_tokens,
            self.accelerator.device,
        )  # fmt: skip
        return self.task.decode(outputs, data.features, data.table)

    def _look(self) -> Noted:
        scores = self.scores(self.dev)
        score = scores[self.task.selects].value
        if self.best is None or score > self.best:
            self.best, self.best_step, self._without_better = score, self.step, 0
            self._keep_best(scores)
        else:
            self._without_better += 1
        return {"scores": {name: score._asdict() for name, score in scores.items()}}

    def _has_lost_patience(self) -> bool:
        patience = self.setting.patience
        return patience is not None and self._without_better >= patience

    def _keep_best(self, scores: dict[str, Score]) -> None:
        if not self.accelerator.is_main_process:
            return
        with replacing(self.folder / f"{BEST}.safetensors") as (path,):
            save_file(_tensors(self.model), path)

    def load_best(self) -> None:
        """Give the model the weights of its best evaluation."""
        self.accelerator.wait_for_everyone()
        tensors = load_file(self.folder / f"{BEST}.safetensors")
        self.model.load_state_dict(tensors, strict=False)

    # --- stopping and going on ------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, from which ``resume`` goes on."""
        state = self.method.state()
        if state and self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._method_file(self.step)) as (path,):
                save_file(state, path)
        checkpoint.save(
            self.folder / CHECKPOINTS,
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.batches,
            extra={
                "seconds": self.seconds,
                "tokens": self.tokens,
                "best": self.best,
                "best_step": self.best_step,
                "without_better": self._without_better,
            },
            keep=self.setting.keep,
        )
        if self.accelerator.is_main_process:
            for path in self.folder.glob(f"{METHOD}-*.safetensors"):
                if path != self._method_file(self.step):
                    path.unlink()

    def _not_finite(self, what: str) -> NotFinite:
        return NotFinite(
            f"step {self.step}: {what}; {self.folder / CHECKPOINTS} holds the last whole "
            "checkpoint: try a lower learning rate"
        )

    def _method_file(self, step: int) -> Path:
        return self.folder / f"{METHOD}-{step:08}.safetensors"

    def resume(self) -> bool:
        """Go where the last whole checkpoint of the folder was taken; False where there is none."""
        found = checkpoint.latest(self.folder / CHECKPOINTS)
        if found is None:
            return False
        loaded = checkpoint.load(
            found, model=self.model, optimizer=self.optimizer, sampler=self.batches
        )
        kept = self._method_file(loaded.step)
        if kept.exists():
            self.method.load_state(load_file(kept))
        self.step, extra = loaded.step, loaded.extra
        self.seconds, self.tokens = extra["seconds"], extra["tokens"]
        self.best, self.best_step = extra["best"], extra["best_step"]
        self._without_better = extra["without_better"]
        return True

    def _noted(self, kind: str, **values: Any) -> Noted:
        return self.log.write(
            self.step, kind, epoch=round(self._epochs_done(), 4), **values,
            seconds=round(self.seconds, 3), tokens=self.tokens,
        )  # fmt: skip

    def _epochs_done(self) -> float:
        return float(np.interp(self.step, [0, *self.ends], range(self.epochs + 1)))


def _scaled(model: nn.Module, weight_decay: float, rates: dict[str, float]) -> list[dict[str, Any]]:
    """``param_groups`` with the methods' factors of the learning rate."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for group in param_groups(model, weight_decay):
        for parameter in group["params"]:
            scale = group["lr_scale"] * rates.get(names[id(parameter)], 1.0)
            decay = group["weight_decay"]
            new = {"params": [], "weight_decay": decay, "lr_scale": scale}
            groups.setdefault((scale, decay), new)["params"].append(parameter)
    return list(groups.values())


def _count(inputs: dict[str, Any]) -> int:
    """What a batch's loss is a mean over: labelled tokens, or sequences."""
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return int(inputs["batch"].num_sequences)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, each once: of one under several names, the first."""
    seen: set[int] = set()
    found = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            found[name] = x.detach().cpu().contiguous()
    return found
