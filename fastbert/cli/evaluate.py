"""``fastbert evaluate`` and ``fastbert predict``: what a trained model says of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

_MODEL = typer.Option(help="Folder of `fastbert finetune`, of `fastbert quantize`, or a BERT's.")
_DATA = typer.Option(help="csv, tsv, jsonl, parquet, conll, conllu, SQuAD json, or datasets:NAME.")
_TASK = typer.Option(help="For a model that was not trained here; its labels are its config's.")
_COLUMN = typer.Option(help="role=column, such as text=question; as in training unless given.")
_SKIP = typer.Option("--skip-bad", help="Leave bad rows out, and count them.")
_TOKENS = typer.Option(help="Tokens that are computed at once.", min=8)
_DEVICE = typer.Option(help="cpu or cuda; a GPU where there is one, for a float model.")


def evaluate(
    model: Annotated[Path, _MODEL],
    data: Annotated[str, _DATA],
    task: Annotated[str | None, _TASK] = None,
    column: Annotated[list[str] | None, _COLUMN] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="File to write a prediction a row to, as JSON lines.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the confusion matrix and the calibration.")
    ] = None,
    batch_tokens: Annotated[int, _TOKENS] = 4096,
    device: Annotated[str | None, _DEVICE] = None,
    skip_bad: Annotated[bool, _SKIP] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Score a model on labelled rows, with 95% confidence intervals."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.finetune.report import plot

    found = _evaluated(model, data, task, column, True, skip_bad, batch_tokens, device)
    _write(predictions, found)
    if plots is not None:
        outcomes = found.task.outcomes(found.predictions, found.table)
        if outcomes is None:
            raise ValueError(f"--plots: {found.task.name} has no classes to draw")
        plots.mkdir(parents=True, exist_ok=True)
        plot(plots, outcomes)
    if as_json:
        scores = {name: score._asdict() for name, score in found.scores.items()}
        text = {
            "rows": len(found.table), "windowed": found.windowed, "truncated": found.truncated,
            "left_out": found.left_out, "scores": scores,
        }  # fmt: skip
        return print(json.dumps(text, indent=2))
    table = Table(box=None)
    for heading in ("score", "value", "95% interval"):
        table.add_column(heading)
    for name, score in found.scores.items():
        table.add_row(name, f"{score.value:.4f}", f"{score.low:.4f} - {score.high:.4f}")
    Console().print(table)
    _say_what_was_read(found)


def predict(
    model: Annotated[Path, _MODEL],
    data: Annotated[str, _DATA],
    out: Annotated[Path, typer.Option(help="File to write a prediction a row to, as JSON lines.")],
    task: Annotated[str | None, _TASK] = None,
    column: Annotated[list[str] | None, _COLUMN] = None,
    batch_tokens: Annotated[int, _TOKENS] = 4096,
    device: Annotated[str | None, _DEVICE] = None,
    skip_bad: Annotated[bool, _SKIP] = False,
) -> None:
    """Predict for every row of a file; labels are not looked at."""
    found = _evaluated(model, data, task, column, False, skip_bad, batch_tokens, device)
    _write(out, found)
    _say_what_was_read(found)
    print(out)


def load_any(folder: Path) -> Any:
    """The model of a folder of ``fastbert quantize``, ``fastbert finetune`` or of Hugging Face."""
    from fastbert.compress import load as load_quantised
    from fastbert.finetune.saved import load

    return load_quantised(folder) if (folder / "fastbert.json").is_file() else load(folder)


def columns_of(given: list[str] | None) -> dict[str, str]:
    """``role=column`` texts as a dict."""
    columns = {}
    for text in given or []:
        role, equals, name = text.partition("=")
        if not equals:
            raise ValueError(f"--column: got {text!r}, expected role=column: text=question")
        columns[role] = name
    return columns


def _evaluated(
    model: Path, data: str, task: str | None, column: list[str] | None, labelled: bool,
    skip_bad: bool, batch_tokens: int, device: str | None,
) -> Any:  # fmt: skip
    from rich.console import Console

    from fastbert.finetune.evaluate import Examiner

    with Console(stderr=True).status("reading") as status:
        examiner = Examiner(
            model, data, task=task, columns=columns_of(column), labelled=labelled, skip_bad=skip_bad
        )
        status.update("computing")
        loaded = load_any(model)
        where = device or _best_device(loaded)
        return examiner(loaded.to(where), batch_tokens=batch_tokens, device=where)


def _best_device(model: Any) -> str:
    """A quantised model was most likely made for the CPU."""
    import torch

    from fastbert.compress import QuantizedModel

    on_gpu = torch.cuda.is_available() and not isinstance(model, QuantizedModel)
    return "cuda" if on_gpu else "cpu"


def _write(path: Path | None, found: Any) -> None:
    from fastbert.finetune.report import write_predictions

    if path is not None:
        write_predictions(path, found.predictions, found.table)


def rows_text(rows: int, windowed: int, truncated: int) -> str:
    """How many there are, and what became of those that are too long."""
    more = ((windowed, "in windows"), (truncated, "cut"))
    return f"{rows:,} rows" + "".join(f", {count:,} {text}" for count, text in more if count)


def _say_what_was_read(found: Any) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    text = rows_text(len(found.table), found.windowed, found.truncated)
    console.print(text, highlight=False)
    for reason, count in found.left_out.items():
        console.print(f"left out: {count:,} ({reason})", highlight=False)
