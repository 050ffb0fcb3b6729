"""``fastbert pretrain``: a corpus to a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer


def pretrain(
    corpus: Annotated[
        Path | None, typer.Option(help="Folder that `fastbert prepare` wrote.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run, new unless --resume.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="bert-base, roberta, electra, …; --list shows all.")
    ] = "minutes",
    size: Annotated[
        str, typer.Option(help="tiny, mini, small, medium, base, large, or a config.json.")
    ] = "tiny",
    steps: Annotated[int | None, typer.Option(help="How long: updates.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="How long: by the clock.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Such as mlm+sop; the preset's unless given.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="token, word, span, random-span or unit.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Part of the tokens that is masked.")] = None,
    span: Annotated[str | None, typer.Option(help="Lengths of spans: geometric:.2:10, …")] = None,
    mask_token: Annotated[str | None, typer.Option(help="mask or unk.")] = None,
    source: Annotated[
        str | None, typer.Option(help="pairs, full-sentences, segments or streams.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Of sequences, in tokens, in every phase.", min=8)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences in an update, in every phase.", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    stack: Annotated[
        str | None, typer.Option(help="Numbers of layers to grow through: 3,6,12.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Hugging Face folder to go on from.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens that a process computes at once.", min=8)
    ] = 4096,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that make batches.", min=0)] = 1,
    evaluate_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 500,
    save_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 500,
    log: Annotated[
        str | None, typer.Option(help="tensorboard or wandb, beside OUT/log.jsonl.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="A minute on Python's own documentation: nothing is downloaded."
        ),
    ] = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Objectives, sources and presets, with their papers.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the options, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Pretrain a BERT on a corpus, or go on with one, in the way of a published recipe.

    A preset is a set of options: the others here change one of them each. The result in OUT/model
    is a Hugging Face folder. Under `accelerate launch` or torchrun it runs on several devices; with
    `accelerate launch --use_fsdp --fsdp_version 2` these hold a part of the model each.
    """
    if list_all:
        return _print_list()
    from fastbert.pretrain import Setting
    from fastbert.pretrain import preset as preset_options
    from fastbert.pretrain import pretrain as run

    changes = {
        "size": size, "objective": objective, "what": mask, "rate": rate, "span": span,
        "mask_token": mask_token, "source": source, "learning_rate": lr,
        "stack": None if stack is None else _numbers(stack),
    }  # fmt: skip
    options = preset_options(preset, **{k: x for k, x in changes.items() if x is not None})
    sizes = {k: x for k, x in (("length", length), ("batch", batch)) if x is not None}
    phases = tuple(dataclasses.replace(phase, **sizes) for phase in options.phases)
    options = dataclasses.replace(options, phases=phases)
    if show:
        return print(options.to_json(), end="")
    if demo:
        out = out or Path("pretrain-demo")
        corpus, minutes = _documentation(out), minutes or 1.0
        out = out / "run"
    if corpus is None or out is None:
        missing = "--corpus" if corpus is None else "--out"
        raise ValueError(f"{missing}: missing, expected a folder")
    if steps is None and minutes is None:
        minutes = 10.0
    setting = Setting(
        steps=steps, minutes=minutes, batch_tokens=batch_tokens, precision=precision, seed=seed,
        workers=workers, evaluate_every=evaluate_every, save_every=save_every, tracker=log,
    )  # fmt: skip
    with _Shown(hidden=as_json) as shown:
        last = run(corpus, out, options, setting, init=init, resume=resume, tell=shown.tell)
    if as_json:
        print(json.dumps({"out": str(out), "validation": last}, indent=2))
    else:
        print(out / "model")


def _documentation(folder: Path) -> Path:
    """A corpus of the standard library's documentation, in ``folder / "corpus"``."""
    from pydoc_data.topics import topics

    from fastbert.data import prepare

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "documentation.txt"
    # A page a document: blank lines would end it.
    pages = (
        "\n".join(line for line in page.split("\n") if line.strip()) for page in topics.values()
    )
    text.write_text("\n\n".join(pages), encoding="utf-8")
    prepare([text], folder / "corpus", tokenizer="train:4000", held_out=0.05)
    return folder / "corpus"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--stack: got {text!r}, expected numbers with commas: 3,6,12") from None


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from fastbert.pretrain import OBJECTIVES, PRESETS, SOURCES

    console = Console()
    for title, rows in (
        ("objectives, joined by +", [(n, x.summary, x.paper) for n, x in OBJECTIVES.items()]),
        ("sources", [(n, "", x.paper) for n, x in SOURCES.items()]),
        ("presets", [(n, x.summary, x.paper) for n, x in PRESETS.items()]),
    ):
        table = Table(title=title, title_justify="left", box=None)
        for heading in ("name", "what", "paper"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


class _Shown:
    """A progress bar with the losses, what is right, the rate and the time that is left."""

    def __init__(self, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars = Progress(
            BarColumn(20), TextColumn("{task.percentage:3.0f}%  {task.description}"),
            console=Console(stderr=True), disable=hidden,
        )  # fmt: skip
        self._task = self._bars.add_task("starting", total=1.0)
        self._begun = False

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def tell(self, trainer: Any, noted: dict[str, Any]) -> None:
        if not trainer.accelerator.is_main_process:
            return
        if not self._begun:
            self._begun, peak = True, trainer.meter.peak
            self._print(f"MFU is of {peak.flop_s / 1e12:.4g} TFLOP/s ({peak.source})")
        if noted["kind"] == "validation":
            text = ", ".join(
                f"{name}: loss {x['loss']:.3f} (perplexity {x['perplexity']:.1f}), right "
                f"{x['accuracy']:.1%} (by chance {x['chance']:.1%})"
                for name, x in noted["validation"].items()
            )
            return self._print(f"step {noted['step']:,}, held out: {text}")
        text = progress_line(noted, trainer.seconds_left)
        self._bars.update(self._task, completed=trainer.part_done, description=text)

    def _print(self, text: str) -> None:
        self._bars.console.print(text, highlight=False)


def progress_line(noted: dict[str, Any], seconds_left: float) -> str:
    """``step 1,230 mlm 5.021 (right 18.4%) 41,870 tok/s MFU 61.2% ETA 3:05`` of a line of the log:
    the loss by objective, and what it gets right where it was measured."""
    right = noted.get("accuracy", {})
    known = ("step", "kind", "lr", "loss", "accuracy", "tokens_per_s", "mfu", "seconds", "tokens")
    losses = [
        f"{name} {loss:.3f}" + (f" (right {right[name]:.1%})" if name in right else "")
        for name, loss in noted.items()
        if name not in known
    ]
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return (
        f"step {noted['step']:,} {' '.join(losses)} {noted['tokens_per_s']:,.0f} tok/s "
        f"MFU {noted['mfu']:.1%} ETA {left}"
    )
