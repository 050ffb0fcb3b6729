"""finetune: a checkpoint and labelled rows to a model, in one call that can be stopped and resumed.

out/run.json         what the run was started with
out/seed-0/          see ``trainer``, a folder a seed
out/kept.json        the seeds that were not stopped early, once that is decided
out/model/           a Hugging Face folder: the best evaluation of the best seed
out/results.json     scores with confidence intervals, of every seed and of the model
out/predictions.jsonl, confusion.png, calibration.png      of the test rows, else of dev
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.finetune import report, saved
from fastbert.finetune.data import Data, Source, digest, read_data
from fastbert.finetune.methods import Method, parse
from fastbert.finetune.setting import Setting
from fastbert.finetune.trainer import CHECKPOINTS, Trainer
from fastbert.models.bert import BertPreTrained
from fastbert.models.checkpoint import load_config
from fastbert.train.processes import accelerator as new_accelerator

RUN, RESULTS, MODEL, KEPT = "run.json", "results.json", "model", "kept.json"

Tell = Callable[[dict[str, Any]], None]


def finetune(
    model: str | Path,
    train: Source,
    out: str | Path,
    *,
    task: str,
    dev: Source | None = None,
    test: Source | None = None,
    method: Method | str = "plain",
    setting: Setting | None = None,
    seeds: int = 1,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    skip_bad: bool = False,
    new_head: bool = False,
    resume: bool = False,
    accelerator: Any = None,
    tell: Tell = lambda noted: None,
) -> dict[str, Any]:
    """Fine-tune a checkpoint and write the best model to ``out / "model"``; returns what is in
    ``out / "results.json"``.

    model: Hugging Face folder of a BERT, or one that ``fastbert pretrain`` wrote.
    train, dev, test: files, ``datasets:NAME``, or tables; without ``dev`` a tenth of ``train`` is
        held out. The model is chosen by ``dev``; ``test`` is looked at once, in the end.
    task: one of ``TASKS``.  columns: role -> column; the others are guessed.
    method: a Method, or text that ``parse`` reads.
    setting: see there; what it leaves open is filled by the size of the data.
    seeds: runs, of seeds ``setting.seed`` and those that follow; the worse half stop early.
    skip_bad: leave bad rows out, and count them, in place of an error at the first.
    new_head: do not keep the checkpoint's head, though it may be one for the same labels.
    resume: go on where the run in ``out`` was stopped; all else has to be as it was.
    accelerator: of Hugging Face accelerate; None makes one for this process.
    tell: called with what happens, plain data with a "kind".
    Raises ValueError for what does not fit, NotFinite for a loss that is no number, OSError for a
    full disk: the last checkpoint is whole in each case.
    """
    out = Path(out)
    method = parse(method) if isinstance(method, str) else method
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected 1 or more")
    if resume and (out / RESULTS).exists():
        return json.loads((out / RESULTS).read_text(encoding="utf-8"))
    if setting is None:
        setting = Setting()
    data = read_data(
        model, task, train, dev, test, setting=setting, columns=columns, skip_bad=skip_bad
    )
    folder = saved.text_folder(model)
    setting = _filled(setting, method, data, folder)
    own = accelerator is None
    accelerator = accelerator or new_accelerator(setting.precision)
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        raise ValueError("accelerate: got FSDP, expected DDP, or one process, for fine-tuning")
    runs = _Runs(folder, data, method, setting, seeds, new_head, out, accelerator, tell)
    runs.new_model(setting.seed)  # what does not fit together says so before anything is written
    if accelerator.is_main_process:
        facts = _run_facts(folder, data, method, setting, seeds, new_head)
        _begin(out, facts, data.sources(), resume)
    accelerator.wait_for_everyone()
    tell({"kind": "data", **data.describe(), "setting": setting.to_dict(), "method": str(method)})
    results = runs.results()
    if own:
        accelerator.end_training()
    return results


def settled(
    model: str | Path, *, setting: Setting, method: Method | str = "plain", **files: Any
) -> Setting:
    """The setting that ``finetune`` would train with, nothing left open. files: as ``read_data``
    takes them."""
    method = parse(method) if isinstance(method, str) else method
    files.pop("new_head", None)
    data = read_data(model, setting=setting, **files)
    return _filled(setting, method, data, saved.text_folder(model))


def _filled(setting: Setting, method: Method, data: Data, folder: Path) -> Setting:
    """With the method's own learning rate, and what the size of the data calls for."""
    if setting.learning_rate is None and method.learning_rate is not None:
        setting = setting.replace(learning_rate=method.learning_rate)
    return setting.for_data(len(data.train.table), load_config(folder))


def _run_facts(
    folder: Path, data: Data, method: Method, setting: Setting, seeds: int, new_head: bool
) -> dict[str, Any]:
    return {
        "model": str(folder.resolve()),
        "task": data.task.state(),
        "columns": data.columns,
        "method": str(method),
        "setting": setting.to_dict(),
        "seeds": seeds,
        "new_head": new_head,
        "train_crc32": digest(data.train.features),
        "dev_crc32": digest(data.dev.features),
    }


def _begin(out: Path, facts: dict[str, Any], sources: dict[str, str], resume: bool) -> None:
    """facts: that have to be the same when the run is resumed.  sources: which are written down
    beside them; files may move."""
    path = out / RUN
    facts = json.loads(json.dumps(facts))
    if resume:
        if not path.exists():
            raise ValueError(f"out: {out} holds no run to resume: {RUN} is not there")
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in facts if begun.get(name) != facts[name]]
        if changed:
            raise ValueError(
                f"resume: {', '.join(changed)} of the run in {out} were others; start a new one in "
                "another folder"
            )
        return
    if path.exists():
        raise ValueError(f"out: {out} holds a run already; resume it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, {**facts, "sources": sources})


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass
class _Runs:
    """All seeds of one call of ``finetune``."""

    folder: Path
    data: Data
    method: Method
    setting: Setting
    seeds: int
    new_head: bool
    out: Path
    accelerator: Any
    tell: Tell

    def results(self) -> dict[str, Any]:
        first = self.setting.seed
        going = list(range(first, first + self.seeds))
        rows: dict[int, dict[str, Any]] = {}
        part = self.setting.early_stop
        if self.seeds > 1 and part > 0:
            for seed in going:
                rows[seed] = self._train(seed, until=part)
            going = self._kept(rows)
            self.tell({"kind": "early stop", "kept": going})
        for seed in going:
            rows[seed] = self._train(seed)
        best = max(going, key=lambda seed: rows[seed]["best"])
        results = self._finish(best, rows)
        self.accelerator.wait_for_everyone()
        return results

    def _kept(self, rows: dict[int, dict[str, Any]]) -> list[int]:
        """The better half of the seeds. Written down, because a run that is resumed has evaluations
        of some of them that the decision did not have."""
        path = self.out / KEPT
        self.accelerator.wait_for_everyone()
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        ranked = sorted(rows, key=lambda seed: -rows[seed]["best"])
        kept = sorted(ranked[: math.ceil(self.seeds / 2)])
        self.accelerator.wait_for_everyone()  # nobody sees the file that others do not see
        if self.accelerator.is_main_process:
            _write_json(path, kept)
        return kept

    def new_model(self, seed: int) -> BertPreTrained:
        """The checkpoint with the task's head, as the method wants it.

        Raises ValueError where checkpoint, task and method do not go together.
        """
        data = self.data
        model = saved.start(self.folder, data.task, self.setting, seed, new_head=self.new_head)
        counts = data.class_counts()
        if counts is not None:
            self.method.count_classes(counts)
        self.method.prepare(model)
        return model

    def _trainer(self, seed: int) -> Trainer:
        data, setting = self.data, self.setting
        model = self.new_model(seed)
        folder = self.out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            model, data.task, self.method, data.train, data.dev, setting, folder,
            self.accelerator, seed,
        )  # fmt: skip
        if self.seeds > 1 and setting.early_stop > 0:
            trainer.looks.add(math.ceil(setting.early_stop * trainer.total_steps))
        trainer.resume()
        return trainer

    def _train(self, seed: int, until: float = 1.0) -> dict[str, Any]:
        trainer = self._trainer(seed)
        for noted in trainer.run(until):
            place = {"seed": seed, "part_done": trainer.part_done}
            self.tell({**place, "selects": self.data.task.selects, **noted})
        self.accelerator.free_memory()
        return {
            "seed": seed, "best": trainer.best, "step": trainer.best_step,
            "steps": trainer.step, "seconds": trainer.seconds, "tokens": trainer.tokens,
        }  # fmt: skip

    def _finish(self, best: int, rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Write the model of the best seed, and what it says."""
        data, trainer = self.data, self._trainer(best)
        trainer.load_best()
        self.method.finish(trainer.model)
        results: dict[str, Any] = {
            "task": data.task.name, "selects": data.task.selects, "method": str(self.method),
            "seed": best, "seeds": [rows[seed] for seed in sorted(rows)],
            "setting": self.setting.to_dict(), "data": data.describe(),
        }  # fmt: skip
        for name, part in (("dev", data.dev), ("test", data.test)):
            if part is not None:
                predictions = trainer.predictions(part)
                scores = data.task.scores(predictions, part.table)
                results[name] = {key: score._asdict() for key, score in scores.items()}
                shown = predictions, part.table
        if self.accelerator.is_main_process:
            model = self.out / MODEL
            saved.save(trainer.model, data.task, data.reading, data.columns, model)
            report.write(self.out, data.task, *shown, results)
            _write_json(self.out / RESULTS, results)
            for folder in self.out.glob("seed-*"):
                # What the model was chosen from has served; its size is several times the model's.
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                for path in folder.glob("*.safetensors"):
                    path.unlink()
        return results
