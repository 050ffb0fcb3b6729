"""Trainer: the loop of a pretraining run, from its first step or from where it was stopped.

A run's folder holds

    run.json           everything that the run was started with
    log.jsonl          a line for each step that was looked at, and for each evaluation
    checkpoints/       see ``fastbert.train.checkpoint``; never a pickle
    model/             in the end: a Hugging Face folder with a model card

Devices, mixed precision and several processes are those of Hugging Face accelerate: the same code
runs under ``accelerate launch`` and ``torchrun``, as DDP or FSDP2. Ranks never see the same
example; a run may go on with more or fewer of them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastbert.config import BertConfig
from fastbert.data import Corpus, TokenBatches
from fastbert.pretrain.collate import PretrainingBatch, collate
from fastbert.pretrain.course import Course
from fastbert.pretrain.data import PretrainingData
from fastbert.pretrain.encode import slow_mask
from fastbert.pretrain.evaluation import evaluate, first_batches
from fastbert.pretrain.model import PretrainingModel
from fastbert.pretrain.options import Options
from fastbert.pretrain.record import noted
from fastbert.pretrain.setting import Setting
from fastbert.pretrain.stacking import stack_all
from fastbert.train import AdamW, Lamb, checkpoint, param_groups
from fastbert.train.errors import NotFinite
from fastbert.train.flops import Meter, peak
from fastbert.train.logging import Log
from fastbert.train.processes import broken, mean, prepare, summed
from fastbert.train.rng import seed_all

_log = logging.getLogger("fastbert")

Tensor = torch.Tensor

OPTIMIZERS = {"adamw": AdamW, "lamb": Lamb}
CHECKPOINTS = "checkpoints"
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains a model of ``options`` on ``corpus``.

    folder: of the run, which exists when ``run`` is called.
    accelerator: of Hugging Face accelerate.
    init: a Hugging Face folder that the model begins as, of whatever size it is; None begins at
        random.
    held_out: the corpus's held-out text; None where there is none, or too little for the objectives
        to make examples of.
    course, progress: where the run is.
    Raises ValueError for what does not fit together; nothing is written before ``run``.
    """

    def __init__(
        self,
        corpus: str | Path,
        options: Options,
        setting: Setting,
        folder: Path,
        accelerator: Any,
        init: Path | None = None,
    ) -> None:
        if init is not None and options.stack:
            raise ValueError(f"stack: got {options.stack} beside init, whose depth stays")
        self.course = Course(options, setting)
        self.options, self.progress = self.course.options, self.course.progress
        self.setting, self.folder, self.accelerator = setting, folder, accelerator
        self.meter = Meter(peak(accelerator.device, setting.precision), accelerator.num_processes)
        self.log = Log(
            folder, setting.tracker, settings=json.loads(options.to_json()),
            active=accelerator.is_main_process,
        )  # fmt: skip
        self.corpus = Corpus(corpus)
        seed_all(setting.seed)
        self._enter(0)
        self.held_out = self._usable(Corpus(corpus, "valid"))
        self._build(self._first_model(init))
        self._tell_of_masks()
        if accelerator.num_processes > 1:  # all began alike; from here on each drops its own
            seed_all(setting.seed, accelerator.process_index)

    def _enter(self, phase: int) -> None:
        """Begin the data of a phase."""
        self.phase = phase
        setting, chosen = self.setting, self.options.phases[phase]
        self.data = self.options.data(self.corpus, chosen, seed=setting.seed)
        self.batches = TokenBatches(
            self.data.lengths,
            max(setting.batch_tokens, chosen.length),
            seed=setting.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self._validation: PretrainingData | None = None

    def _usable(self, held_out: Corpus) -> Corpus | None:
        """The held-out text, if examples can be made of it as they were of the text to train on."""
        if not held_out.num_documents:
            return None
        try:
            self.options.data(held_out, self.options.phases[0], seed=self.setting.seed)
        except ValueError as error:
            self._warn(f"held-out text: too little of it to evaluate anything on, documents: "
                       f"{held_out.num_documents:,} ({error})")  # fmt: skip
            return None
        return held_out

    def _tell_of_masks(self) -> None:
        dtype = _DTYPES[self.setting.precision]
        why = slow_mask(self.model.config, self.accelerator.device, dtype)
        for objective in self.options.objectives():
            if objective.masks_attention and why is not None:
                self._warn(f"{objective.name}: not every token sees every other: attention takes a "
                           f"mask, and runs on the slow reference path ({why})")  # fmt: skip

    def _warn(self, text: str) -> None:
        if self.accelerator.is_main_process:
            _log.warning("%s", text)

    def _first_model(self, init: Path | None) -> PretrainingModel:
        if init is not None:
            return self._continued(init)
        config = self.options.config(self.corpus.vocab_size)
        if self.course.layers is not None:
            config = config.replace(num_hidden_layers=self.course.layers)
        return PretrainingModel(config, self.options.objectives())

    def _continued(self, init: Path) -> PretrainingModel:
        model = PretrainingModel.from_pretrained(
            init, self.options.objectives(), hidden_dropout_prob=self.options.dropout,
            attention_probs_dropout_prob=self.options.dropout,
        )  # fmt: skip
        if model.config.vocab_size != self.corpus.vocab_size:
            raise ValueError(
                f"init: {init} has a vocabulary of {model.config.vocab_size}, the corpus one "
                f"of {self.corpus.vocab_size}; prepare the corpus with --tokenizer {init}"
            )
        longest = max(phase.length for phase in self.options.phases)
        if longest > model.config.max_position_embeddings:
            raise ValueError(
                f"phases: got a length of {longest}, expected at most that of {init}, "
                f"{model.config.max_position_embeddings}"
            )
        return model

    def _build(self, model: PretrainingModel) -> None:
        """Train this one, with an optimizer of its own."""
        self.model = model.to(self.accelerator.device).train()
        o = self.options
        optimizer = OPTIMIZERS[o.optimizer](
            param_groups(self.model, o.weight_decay), o.learning_rate, o.betas, o.eps,
            o.weight_decay, o.bias_correction, o.max_grad_norm,
        )  # fmt: skip
        self.wrapped, self.optimizer = prepare(self.accelerator, self.model, optimizer)

    # --- going on -----------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go where the last whole checkpoint of the folder was taken; False where there is none."""
        found = checkpoint.latest(self.folder / CHECKPOINTS)
        if found is None:
            return False
        extra = json.loads((found / "state.json").read_bytes())["extra"]
        config = BertConfig.from_dict(extra["config"])
        if config != self.model.config:  # it began as a model of another size, or has grown
            self._build(PretrainingModel(config, self.options.objectives()))
        self._enter(extra["phase"])
        loaded = checkpoint.load(
            found, model=self.model, optimizer=self.optimizer, sampler=self.batches
        )
        progress = self.progress
        progress.step, progress.seconds, progress.tokens = (
            loaded.step, extra["seconds"], extra["tokens"]
        )  # fmt: skip
        return True

    def save(self) -> Path:
        """Write a checkpoint, but never over a good one what is no number any more.

        Raises NotFinite.
        """
        if broken(self.accelerator, self.model):
            raise self._not_finite(self.progress.step, "parameters are no numbers any more")
        return checkpoint.save(
            self.folder / CHECKPOINTS,
            self.progress.step,
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.batches,
            extra={
                "seconds": self.progress.seconds,
                "tokens": self.progress.tokens,
                "phase": self.phase,
                "config": self.model.config.to_dict(),
            },
            keep=self.setting.keep,
        )

    # --- training -----------------------------------------------------------------------------

    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end. What is yielded is in the log too: "loss" and the like every
        ``log_every`` steps, "validation" every ``evaluate_every`` and in the end.

        Raises NotFinite.
        """
        self.log.begin(self.progress.step)
        try:
            yield from self._run()
        finally:
            self.log.close()

    def _run(self) -> Iterator[dict[str, Any]]:
        setting, course = self.setting, self.course
        evaluations = [row["step"] for row in noted(self.folder, "validation")]
        if self.progress.step and self.progress.step not in evaluations:
            yield from self._evaluated()  # it was stopped behind the checkpoint
        batches = self.training_batches()
        while course.part_done < 1.0:
            began = time.perf_counter()
            if course.phase != self.phase:
                self._enter(course.phase)
                batches = self.training_batches()
            # A run that was made longer may be deeper already than it has to be.
            if course.layers is not None and course.layers > self.model.config.num_hidden_layers:
                self.grow()
            step = self.progress.step + 1
            look = step % setting.log_every == 0
            parts = [next(batches) for _ in range(self._parts())]
            seen = self.update(parts, measure=look)
            # On a GPU nobody waits for the loss of every step.
            if look or seen["loss"].device.type == "cpu":
                self._check(step, seen["loss"])
            self._count(parts, time.perf_counter() - began)
            if course.is_due(setting.log_every):
                self._check(step, seen["loss"])
                yield self._noted("train", lr=course.learning_rate, **_numbers(seen),
                                  **self.meter.read())  # fmt: skip
            if course.is_due(setting.save_every):
                self.save()  # before the evaluation: what it may run into costs no work
            yield from self._evaluated()

    def _evaluated(self) -> Iterator[dict[str, Any]]:
        if self.held_out is not None and self.course.is_due(self.setting.evaluate_every):
            yield self._noted("validation", validation=self.evaluate())

    def _parts(self) -> int:
        """How many batches make the next update."""
        tokens = self.course.update_tokens / self.accelerator.num_processes
        return max(1, round(tokens / self.batches.max_tokens))

    def _count(self, parts: list[PretrainingBatch], seconds: float) -> None:
        """Add a step to the progress: ranks agree on it, and on when a run by the clock ends."""
        tokens = sum(part.inputs.num_tokens for part in parts)
        flops = sum(self.model.flops(part) for part in parts)
        tokens, mflops, microseconds = summed(
            self.accelerator, [tokens, flops // 10**6, int(seconds * 1e6)]
        )
        if (ranks := self.accelerator.num_processes) > 1:
            seconds = microseconds / 1e6 / ranks
        self.progress.step += 1
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        self.meter.add(tokens, mflops * 10**6, seconds)

    def _noted(self, kind: str, **values: Any) -> dict[str, Any]:
        progress = self.progress
        return self.log.write(
            progress.step, kind, **values, seconds=round(progress.seconds, 3),
            tokens=progress.tokens,
        )  # fmt: skip

    def _check(self, step: int, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise self._not_finite(step, f"the loss is {loss.item()}")

    def _not_finite(self, step: int, what: str) -> NotFinite:
        whole = checkpoint.latest(self.folder / CHECKPOINTS)
        left = "no checkpoint was written yet" if whole is None else f"{whole} is whole"
        return NotFinite(f"step {step}: {what}; {left}. A lower learning rate may help")

    def update(self, parts: list[PretrainingBatch], measure: bool = False) -> dict[str, Any]:
        """One step on the accumulated batches: its "loss", the mean loss of each summand by name
        and, if it is to measure, "accuracy", of each summand that has one."""
        lr = self.course.learning_rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["lr_scale"])
            else:
                group["lr"] = lr * group["lr_scale"]
        self.model.train()
        # DDP takes the mean of the ranks' gradients, where the sum over all targets is wanted.
        divisors = {k: n / self.accelerator.num_processes for k, n in self._counts(parts).items()}
        losses: list[Tensor] = []
        totals: dict[str, list[Tensor]] = {}
        correct: dict[str, list[Tensor]] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    output = self.wrapped(
                        part.to(self.accelerator.device), divisors=divisors, measure=measure
                    )
                self.accelerator.backward(output.loss)
            losses.append(output.loss.detach())
            for name, term in output.terms.items():
                divisor = divisors[name] or 1
                totals.setdefault(name, []).append(term.total.detach() / divisor)
                if term.correct is not None:
                    correct.setdefault(name, []).append(term.correct / divisor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in parts:
            self.batches.advance()
        seen: dict[str, Any] = {"loss": mean(self.accelerator, losses)}
        seen |= {name: mean(self.accelerator, x) for name, x in totals.items()}
        if correct:
            seen["accuracy"] = {name: mean(self.accelerator, x) for name, x in correct.items()}
        return seen

    def grow(self) -> None:
        """Go on with twice the layers (``fastbert.pretrain.stacking``), moments and all."""
        values = stack_all(self.model.state_dict())
        names: dict[Any, str] = {p: name for name, p in self.model.named_parameters()}
        moments = stack_all({names[p]: state for p, state in self.optimizer.state.items()})
        config = self.model.config
        config = config.replace(num_hidden_layers=2 * config.num_hidden_layers)
        self.accelerator.free_memory()
        with torch.random.fork_rng(devices=[]):
            self._build(PretrainingModel(config, self.options.objectives()))
        self.model.load_state_dict(values)
        for name, parameter in self.model.named_parameters():
            if name in moments:
                self.optimizer.state[parameter] = moments[name]

    def training_batches(self) -> Iterator[PretrainingBatch]:
        """Those of the phase, epoch after epoch, from where ``batches`` is."""
        while True:
            yield from self._loader(self.data, self.batches, self.batches.epoch)

    def _loader(self, data: PretrainingData, batches: Any, epoch: int) -> Any:
        data.set_epoch(epoch)
        workers = self.setting.workers
        # A generator of its own: making an iterator draws a number, and a run that goes on from a
        # checkpoint makes one more than a run that was never stopped.
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.setting.seed),
        )

    # --- several processes --------------------------------------------------------------------

    def _counts(self, parts: list[PretrainingBatch]) -> dict[str, int]:
        """Targets of each summand, in all the parts of all ranks: known before any is computed."""
        counts: dict[str, int] = {}
        for part in parts:
            for name, count in self.model.counts(part).items():
                counts[name] = counts.get(name, 0) + count
        totals = summed(self.accelerator, list(counts.values()))
        return dict(zip(counts, map(int, totals), strict=True))

    # --- held-out text ------------------------------------------------------------------------

    def evaluate(self) -> dict[str, dict[str, float]]:
        """On the first ``evaluation_tokens`` of the held-out text, masked as in the first epoch:
        see ``fastbert.pretrain.evaluation``."""
        assert self.held_out is not None
        if self._validation is None:
            phase = self.options.phases[self.phase]
            self._validation = self.options.data(self.held_out, phase, seed=self.setting.seed)
        data = self._validation
        batches = first_batches(
            data.lengths.tolist(), self.setting.evaluation_tokens, self.batches.max_tokens
        )
        return evaluate(self.model, self._loader(data, batches, 0), self.accelerator)


def _numbers(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors, in dicts too, as numbers."""
    return {name: _numbers(x) if isinstance(x, Mapping) else x.item() for name, x in seen.items()}
