"""pretrain: a corpus to a Hugging Face checkpoint, in one call that can be stopped and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.data import Corpus
from fastbert.data.tokenizer import fingerprint
from fastbert.pretrain.options import Options
from fastbert.pretrain.record import RUN, RunRecord, noted
from fastbert.pretrain.setting import Setting
from fastbert.pretrain.trainer import CHECKPOINTS, Trainer
from fastbert.train import checkpoint
from fastbert.train.logging import check_tracker
from fastbert.train.processes import accelerator as new_accelerator

MODEL, PLOT = "model", "loss.png"
_TOKENIZER = "tokenizer"
_DROPOUT = 0.1  # BERT's, for the fine-tuning of a model that was pretrained without

Tell = Callable[[Trainer, dict[str, Any]], None]


def pretrain(
    corpus: str | Path,
    out: str | Path,
    options: Options,
    setting: Setting,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    accelerator: Any = None,
    tell: Tell = lambda *_: None,
) -> dict[str, Any]:
    """Pretrain a BERT and write it to ``out / "model"``; returns the last validation, or {}.

    corpus: what ``fastbert prepare`` wrote.  out: folder of the run, see ``trainer``.
    options, setting: see there; what is run is kept in ``out / "run.json"``.
    init: Hugging Face folder to go on from, of the corpus's vocabulary; the model has its size,
        whatever ``options.size`` says.
    resume: go on where the run in ``out`` was stopped: the same numbers on one CPU, bit for bit, as
        if it had not been. All else is as it was (``RunRecord.read(out)`` has it), but for the
        place of the corpus, the number of workers, and more steps or minutes. A run that ended
        with no more of these just writes its model again.
    accelerator: of Hugging Face accelerate; None makes one for this process.
    tell: called with what is noted in the log, and once before the first step with {"kind":
        "start"} and the numbers of layers, parameters and tokens of an update.
    Raises ValueError for options, a corpus or a folder that do not fit: nothing is written then.
    NotFinite for a loss that is no number, OSError for a full disk: the last checkpoint is whole.
    """
    corpus, out = Path(corpus).resolve(), Path(out)
    Corpus(corpus)  # it says best what is wrong with it
    record = RunRecord(
        corpus=corpus,
        tokenizer_sha256=fingerprint(corpus / _TOKENIZER),
        init=None if init is None else Path(init).resolve(),
        options=options,
        setting=setting,
    )
    begun = RunRecord.read(out) if resume else None
    if begun is not None:
        record = dataclasses.replace(
            record, init=record.init or begun.init, lengthened_at=begun.lengthened_at
        )
        begun.check(record)
    elif (out / RUN).exists():
        raise ValueError(f"out: {out} holds a run already; resume it, or name another folder")
    check_tracker(setting.tracker)
    own = accelerator is None
    accelerator = accelerator or new_accelerator(setting.precision)
    if accelerator.is_local_main_process:
        # Files are mapped: a damaged one would otherwise train a model on whatever it holds.
        for split in ("train", "valid"):
            Corpus(corpus, split).verify()
    # Behind a checkpoint the folder of init is of no more use, and may be gone.
    saved = begun is not None and checkpoint.latest(out / CHECKPOINTS) is not None
    trainer = Trainer(corpus, options, setting, out, accelerator, None if saved else record.init)
    if begun is not None:
        trainer.resume()
        if (setting.steps, setting.minutes) != (begun.setting.steps, begun.setting.minutes):
            at = (*begun.lengthened_at, trainer.progress.step)
            record = dataclasses.replace(record, lengthened_at=at)
    accelerator.wait_for_everyone()  # all have looked at what is about to be written
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        record.write(out)
    accelerator.wait_for_everyone()
    tell(trainer, _start(trainer))
    for line in trainer.run():
        tell(trainer, line)
    dropout = options.dropout or _DROPOUT
    model = trainer.model.to_pretrained(
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    evaluations = noted(out, "validation")
    last: dict[str, Any] = evaluations[-1]["validation"] if evaluations else {}
    if accelerator.is_main_process:
        model.source_folder = corpus / _TOKENIZER
        model.save_pretrained(out / MODEL)
        _write_card(out, trainer, record, last)
        _plot(out)
    if own:
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return last


def _start(trainer: Trainer) -> dict[str, Any]:
    config = trainer.model.config
    return {
        "step": trainer.progress.step,
        "kind": "start",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "update_tokens": round(trainer.course.update_tokens),
    }


def _write_card(out: Path, trainer: Trainer, record: RunRecord, last: dict[str, Any]) -> None:
    """The README.md of a Hugging Face model."""
    o, progress, config = trainer.options, trainer.progress, trainer.model.config
    scores = [
        f"| {name} | {x['loss']:.4f} | {x['perplexity']:.2f} | {x['accuracy']:.1%} | "
        f"{x['chance']:.1%} |"
        for name, x in last.items()
    ]
    lines = [
        "---", "tags: [bert, pretraining, fastbert]", "---", "",
        f"# BERT, {config.num_hidden_layers} layers of {config.hidden_size}", "",
        f"Pretrained with `{o.objective}` on {progress.tokens:,} tokens of a corpus of "
        f"{trainer.corpus.num_tokens:,}, in {progress.step:,} steps "
        f"({progress.seconds / 60:.1f} minutes). `{RUN}` beside this folder reproduces it.", "",
    ]  # fmt: skip
    if record.lengthened_at:
        steps = ", ".join(f"{step:,}" for step in record.lengthened_at)
        lines += [f"It was begun for less, and made longer behind step {steps}.", ""]
    if not o.dropout:
        lines += [
            f"It was pretrained without dropout; `config.json` has BERT's {_DROPOUT}, for "
            "fine-tuning.", "",
        ]  # fmt: skip
    if scores:
        lines += [
            "On held-out text of the same corpus:", "",
            "| objective | loss | perplexity | right | by chance |",
            "| --- | --- | --- | --- | --- |", *scores, "",
        ]  # fmt: skip
    with replacing(out / MODEL / "README.md") as (path,):
        path.write_text("\n".join(lines), encoding="utf-8")


def _plot(out: Path) -> None:
    """The loss over the run, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    train = [(row["tokens"], row["loss"]) for row in noted(out, "train")]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), label="training")
    held_out = noted(out, "validation")
    for name in held_out[-1]["validation"] if held_out else ():
        points = [(row["tokens"], row["validation"][name]["loss"]) for row in held_out]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss")
    axes.legend()
    with replacing(out / PLOT) as (path,):
        figure.savefig(path, format="png", dpi=120)
