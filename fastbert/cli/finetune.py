"""``fastbert finetune``: a checkpoint and labelled rows to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.cli.evaluate import columns_of, rows_text


def finetune(
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder of a BERT.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classify, regress, pairs, multilabel, tag, qa, choice or similarity."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="csv, tsv, jsonl, parquet, conll, conllu, SQuAD json, or datasets:NAME."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write, new unless --resume.")] = None,
    dev: Annotated[
        str | None, typer.Option(help="Rows that the model is chosen by; a tenth of --train else.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Rows to look at once, in the end.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="role=column, such as text=question; guessed unless given."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="freelb, layerwise-lr:.9+mixout:.7, …; --list shows all.")
    ] = "plain",
    then: Annotated[
        str | None, typer.Option(help="Training rows of a second task, behind the first.")
    ] = None,
    then_task: Annotated[
        str | None, typer.Option(help="The second task; the first again unless given.")
    ] = None,
    then_dev: Annotated[str | None, typer.Option(help="As --dev, for the second task.")] = None,
    then_test: Annotated[str | None, typer.Option(help="As --test, for the second task.")] = None,
    then_column: Annotated[
        list[str] | None, typer.Option(help="As --column, for the second task.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the training rows; 3 to 20 by their number unless given.", min=1
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by the width unless given: 3e-5 at 768."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows in an update, on average.", min=1)] = 32,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens that a process computes at once.", min=8)
    ] = 4096,
    warmup: Annotated[
        float, typer.Option(help="Part of the updates in which the learning rate rises.")
    ] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of matrices.", min=0)] = 0.01,
    bias_correction: Annotated[
        bool, typer.Option(help="Of Adam's moments; BERT's own optimiser had none.")
    ] = True,
    dropout: Annotated[
        float | None, typer.Option(help="Probability everywhere; the checkpoint's unless given.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; the model's unless given.", min=4)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that windows share; a quarter unless given.", min=0)
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Runs from other seeds, of which the best is kept.", min=1)
    ] = 1,
    seed: Annotated[int, typer.Option(help="The first run's seed.")] = 0,
    early_stop: Annotated[
        float,
        typer.Option(help="Part of a run after which the worse half of the seeds stop; 0: never."),
    ] = 0.3,
    evaluations: Annotated[
        int, typer.Option(help="Looks at the development rows in an epoch.", min=1)
    ] = 1,
    patience: Annotated[
        int | None, typer.Option(help="Looks without a better score that end a run.", min=1)
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="auto, or a grid such as learning-rate=5e-5/1e-4,batch=16/32."),
    ] = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    log: Annotated[
        str | None, typer.Option(help="tensorboard or wandb, beside OUT/seed-*/log.jsonl.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out, and count them.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Tasks and methods, with their papers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Fine-tune a BERT on labelled rows.

    The result in OUT/model is a Hugging Face folder, which `fastbert quantize`, `evaluate` and
    `predict` read. Under `accelerate launch` or torchrun it runs on several devices.
    """
    if list_all:
        return _print_list()
    needed = {"--model": model, "--task": task, "--train": train, "--out": out}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing")
    assert model is not None and task is not None and train is not None and out is not None
    from fastbert.finetune.methods import parse
    from fastbert.finetune.run import finetune as run
    from fastbert.finetune.setting import Setting
    from fastbert.train.processes import accelerator as new_accelerator

    setting = Setting(
        epochs=epochs, learning_rate=lr, batch=batch, batch_tokens=batch_tokens, warmup=warmup,
        dropout=dropout, max_length=max_length, stride=stride, precision=precision, seed=seed,
        evaluations=evaluations, early_stop=early_stop, tracker=log, patience=patience,
        weight_decay=weight_decay, bias_correction=bias_correction,
    )  # fmt: skip
    shared: dict[str, Any] = {"method": method, "skip_bad": skip_bad}
    files: dict[str, Any] = {
        "train": train,
        "dev": dev,
        "test": test,
        "task": task,
        "columns": columns_of(column),
    }
    if then is not None and parse(method).structural:
        raise ValueError(
            f"--method: {method} leaves the model parts that the second task's does not have; "
            "expected one that does not, with --then"
        )
    accelerator = new_accelerator(precision)
    shown_here = accelerator.is_main_process
    with _Shown(hidden=as_json or not shown_here) as shown:
        if then is not None:
            run(model, out=out / "first", setting=setting, tell=shown.tell, accelerator=accelerator,
                resume=_goes_on(out / "first", resume), **files, **shared)  # fmt: skip
            model = out / "first" / "model"
            files = {
                "train": then, "dev": then_dev, "test": then_test, "task": then_task or task,
                "columns": columns_of(then_column),
            }  # fmt: skip
            shared["new_head"] = True
        if search is not None:
            setting = _searched(search, model, setting, out, resume, shown, files, shared)
        results = run(
            model, out=out, setting=setting, seeds=seeds, tell=shown.tell, accelerator=accelerator,
            resume=_goes_on(out, resume), **files, **shared,
        )  # fmt: skip
    accelerator.end_training()
    if not shown_here:
        return None
    if as_json:
        print(json.dumps({"out": str(out), **results}, indent=2))
    else:
        _print_results(results)
        print(out / "model")


def _goes_on(out: Path, resume: bool) -> bool:
    """Of a run in several parts, those that had not begun begin now."""
    return resume and (out / "run.json").exists()


def _searched(
    grid: str,
    model: Path,
    setting: Any,
    out: Path,
    resume: bool,
    shown: _Shown,
    files: dict[str, Any],
    shared: dict[str, Any],
) -> Any:
    from fastbert.finetune.run import finetune as run
    from fastbert.finetune.run import settled
    from fastbert.finetune.search import SEARCH, parse_grid
    from fastbert.finetune.search import search as best_of

    if (out / SEARCH).exists() and not resume:
        raise ValueError(f"out: {out} holds a search already; resume it, or name another folder")
    setting = settled(model, setting=setting, **files, **shared)
    # The test rows are for the model that is chosen in the end.
    files = {name: value for name, value in files.items() if name != "test"}

    def trial(chosen: Any, folder: Path, look: Any) -> float:
        def tell(noted: dict[str, Any]) -> None:
            shown.tell(noted)
            if noted["kind"] == "dev":
                look(noted["scores"][noted["selects"]]["value"], noted["part_done"])

        shown.say(f"{folder.name}: {chosen.learning_rate:g}, {chosen.epochs} epochs of "
                  f"{chosen.batch}")  # fmt: skip
        results = run(model, out=folder, setting=chosen, tell=tell,
                      resume=_goes_on(folder, True), **files, **shared)  # fmt: skip
        return results["dev"][results["selects"]]["value"]

    return best_of(trial, setting, parse_grid(grid, setting), out)


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from fastbert.finetune.methods import METHODS, Method, Methods
    from fastbert.finetune.tasks import TASKS

    methods: dict[str, type[Method]] = {Methods.name: Methods, **METHODS}
    console = Console()
    for title, rows in (
        ("tasks", [(name, kind.summary) for name, kind in TASKS.items()]),
        ("methods, joined by +", [(n, kind.summary, kind.paper) for n, kind in methods.items()]),
    ):
        table = Table(title=title, title_justify="left", box=None)
        for heading in ("name", "what", "paper")[: len(rows[0])]:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


def _print_results(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in ("rows", "score", "value", "95% interval"):
        table.add_column(heading)
    for part in ("dev", "test"):
        for name, score in results.get(part, {}).items():
            table.add_row(part, name, f"{score['value']:.4f}",
                          f"{score['low']:.4f} - {score['high']:.4f}")  # fmt: skip
    Console().print(table)


class _Shown:
    """A progress bar, and a line for each evaluation."""

    def __init__(self, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=hidden,
        )  # fmt: skip
        self._hidden = hidden
        self._task = self._bars.add_task("reading", total=1.0)

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        if not self._hidden:
            self._bars.console.print(text, highlight=False)

    def tell(self, noted: dict[str, Any]) -> None:
        kind = noted["kind"]
        if kind == "data":
            self._say_data(noted)
        elif kind == "early stop":
            self.say(f"the better seeds go on: {', '.join(map(str, noted['kept']))}")
        elif kind == "dev":
            scores = " ".join(f"{k} {x['value']:.4f}" for k, x in noted["scores"].items())
            self.say(f"seed {noted['seed']}, epoch {noted['epoch']:.2f}: {scores}")
        elif kind == "train":
            rate = noted["tokens"] / max(noted["seconds"], 1e-9)
            text = f"seed {noted['seed']} loss {noted['loss']:.3f} {rate:,.0f} tok/s"
            self._bars.update(self._task, completed=noted["part_done"], description=text)

    def _say_data(self, noted: dict[str, Any]) -> None:
        columns = ", ".join(f"{role}: {name}" for role, name in noted["columns"].items())
        self.say(f"{noted['task']} ({columns})")
        for part in ("train", "dev", "test"):
            if part in noted:
                x = noted[part]
                text = rows_text(x["rows"], x["windowed"], x["truncated"])
                self.say(f"{part}: {x['tokens']:,} tokens, {text}")
        for reason, count in noted["left_out"].items():
            self.say(f"left out: {count:,} ({reason})")
        setting = noted["setting"]
        self.say(
            f"{noted['method']}: {setting['epochs']} epochs of {setting['batch']} rows an update, "
            f"learning rate {setting['learning_rate']:g}"
        )
