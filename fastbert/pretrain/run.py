"""pretrain: a corpus to a Hugging Face checkpoint, in one call that can be stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.data import Corpus
from fastbert.data.tokenizer import fingerprint
from fastbert.pretrain.options import Options
from fastbert.pretrain.setting import Setting
from fastbert.pretrain.trainer import Trainer
from fastbert.train.logging import LOG, check_tracker
from fastbert.train.processes import accelerator as new_accelerator

RUN, MODEL, PLOT = "run.json", "model", "loss.png"
_TOKENIZER = "tokenizer"

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
    init: Hugging Face folder to go on from, of the corpus's vocabulary.
    resume: go on where the run in ``out`` was stopped, with its own options: the same numbers on
        one CPU, bit for bit, as if it had not been.
    accelerator: of Hugging Face accelerate; None makes one for this process.
    tell: called with what is noted in the log.
    Raises ValueError for options, a corpus or a folder that do not fit, NotFinite for a loss that
    is no number, OSError for a full disk: the last checkpoint is whole in each case.
    """
    corpus, out = Path(corpus), Path(out)
    init = None if init is None else Path(init)
    if resume:
        options, setting, init = _begun(corpus, out, setting)
    check_tracker(setting.tracker)
    own = accelerator is None
    accelerator = accelerator or new_accelerator(setting.precision)
    if accelerator.is_local_main_process:
        # Files are mapped: a damaged one would otherwise train a model on whatever it holds.
        for split in ("train", "valid"):
            Corpus(corpus, split).verify()
    if accelerator.is_main_process and not resume:
        _begin(corpus, out, options, setting, init)
    accelerator.wait_for_everyone()
    trainer = Trainer(corpus, options, setting, out, accelerator, init)
    if resume:
        trainer.resume()
    last: dict[str, Any] = {}
    for noted in trainer.run():
        tell(trainer, noted)
        last = noted.get("validation", last)
    model = trainer.model.to_pretrained()
    if accelerator.is_main_process:
        model.source_folder = corpus / _TOKENIZER
        model.save_pretrained(out / MODEL)
        _write_card(out, trainer, last)
        _plot(out)
    if own:
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return last


def _begin(corpus: Path, out: Path, options: Options, setting: Setting, init: Path | None) -> None:
    if (out / RUN).exists():
        raise ValueError(f"out: {out} holds a run already; resume it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    text = {
        "corpus": str(corpus.resolve()),
        "tokenizer_sha256": fingerprint(corpus / _TOKENIZER),
        "init": None if init is None else str(init.resolve()),
        "options": json.loads(options.to_json()),
        "setting": dataclasses.asdict(setting),
    }
    with replacing(out / RUN) as (path,):
        path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _begun(corpus: Path, out: Path, setting: Setting) -> tuple[Options, Setting, Path | None]:
    """What the run in ``out`` was begun with. Of ``setting`` only ``workers`` counts."""
    try:
        found = json.loads((out / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"out: {out} holds no run to resume: {RUN} is not there") from None
    if found["tokenizer_sha256"] != fingerprint(corpus / _TOKENIZER):
        raise ValueError(f"corpus: {corpus} has another tokenizer than the run in {out}")
    init = None if found["init"] is None else Path(found["init"])
    begun = Setting(**{**found["setting"], "workers": setting.workers})
    return Options.from_json(json.dumps(found["options"])), begun, init


def _write_card(out: Path, trainer: Trainer, last: dict[str, Any]) -> None:
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
    rows = [json.loads(x) for x in (out / LOG).read_text(encoding="utf-8").splitlines()]
    train = [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), label="training")
    held_out = [row for row in rows if row["kind"] == "validation"]
    for name in held_out[-1]["validation"] if held_out else ():
        points = [(row["tokens"], row["validation"][name]["loss"]) for row in held_out]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss")
    axes.legend()
    with replacing(out / PLOT) as (path,):
        figure.savefig(path, format="png", dpi=120)
