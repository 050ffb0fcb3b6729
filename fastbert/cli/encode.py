"""``fastbert encode``: a text file to a file of vectors, on the CPU, without torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def encode(
    model: Annotated[Path, typer.Option(help="Folder that `fastbert quantize` wrote.")],
    input: Annotated[Path, typer.Option(help="Text file in UTF-8: one text a line.")],
    output: Annotated[Path, typer.Option(help=".npy file to write: a row of fp32 a line.")],
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls, max or pooler; the model's own unless given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; one a core.", min=1)] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens that run at once.", min=1)] = 4096,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew rather than go on with an earlier run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Write a vector for every line of a text file of any size, in little memory.

    The kernels run without torch. Interrupted, the same command goes on where it stopped:
    OUTPUT.part and OUTPUT.progress hold what is done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from fastbert.runtime import Encoder, encode_file

    start = time.perf_counter()
    encoder = Encoder(model, threads)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    size = input.stat().st_size if input.is_file() else None
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("encoding", total=size)

        def advance(done: int, rows: int) -> None:
            progress.update(task, completed=done, description=f"{rows:,} lines")

        rows = encode_file(
            encoder,
            input,
            output,
            restart=restart,
            advance=advance,
            pooling=pooling,
            batch_tokens=batch_tokens,
        )
    seconds = time.perf_counter() - start
    if as_json:
        report = {"output": str(output), "rows": rows, "width": encoder.hidden_size}
        print(json.dumps({**report, "seconds": seconds}, indent=2))
    else:
        print(f"{rows:,} vectors of {encoder.hidden_size} in {seconds:.1f} s: {output}")
