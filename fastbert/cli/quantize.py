"""``fastbert quantize``: a Hugging Face folder to an int8 or bf16 model for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def quantize(
    model: Annotated[Path, typer.Option(help="Hugging Face or sentence-transformers folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; made when missing.")],
    scheme: Annotated[
        str, typer.Option(help="int8-dynamic, int8-static (needs --calibration) or bf16.")
    ] = "int8-dynamic",
    calibration: Annotated[
        Path | None, typer.Option(help="Text file: one typical input a line, a few hundred.")
    ] = None,
    calibrate: Annotated[
        str, typer.Option(help="Static scales by max, percentile, entropy or mse.")
    ] = "mse",
    smooth_quant: Annotated[
        float, typer.Option(help="SmoothQuant's alpha, 0 to 1: how much moves into the weights.")
    ] = 0.5,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="Layer or Linear to keep in bf16: layers.3, layers.3.down, down."),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(help="Labelled rows to score before and after, of a fine-tuned model."),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(help="Points that --evaluate may lose; layers stay in bf16 until it holds."),
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Quantise a model of the BERT family for fast inference on CPUs and GPUs.

    Hugging Face models other than BERT need transformers: pip install "fastbert[hf]". The result
    is read by fastbert.load and, without torch, by fastbert.runtime.Encoder and `fastbert encode`.
    """
    from rich.console import Console

    from fastbert.compress import load_float
    from fastbert.compress import quantize as run
    from fastbert.finetune.saved import copy_task

    with Console(stderr=True).status("loading the model") as status:
        texts = None if calibration is None else _lines(calibration)
        source = load_float(model)
        status.update("quantising")
        result = run(
            source, scheme, calibration=texts, calibrate=calibrate, smooth_quant=smooth_quant,
            keep_float=keep_float or [], evaluate=_points(model, evaluate), max_loss=max_loss,
        )  # fmt: skip
        status.update("writing")
        result.save_pretrained(out)
        copy_task(model, out)
    report: dict[str, Any] = {"out": str(out), **result.report.to_dict()}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(f"{result.report}\n{out}", highlight=False)


def _points(model: Path, data: str | None) -> Any:
    """A model's score on ``data``, in points of 100, as ``fastbert.quantize`` takes it."""
    if data is None:
        return None
    from fastbert.finetune.evaluate import Examiner

    examiner = Examiner(model, data)
    return lambda candidate: 100 * examiner(candidate).score


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--calibration: {path} is no file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibration: {path} is not UTF-8: {error}") from None
    return [line for line in map(str.strip, lines) if line]
