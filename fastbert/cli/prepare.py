"""``fastbert prepare``: text to a corpus for pretraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    text: Annotated[
        list[str],
        typer.Option(
            help="Files (.txt, .jsonl, .parquet, also .gz and .zst), folders, patterns, or "
            "datasets:NAME@CONFIG:SPLIT:COLUMN, of which NAME suffices; several may follow.",
            metavar="FILES…",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; made when missing.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    tokenizer: Annotated[
        str, typer.Option(help="train:N for one of N tokens, or a Hugging Face folder.")
    ] = "train:30522",
    cased: Annotated[
        bool, typer.Option("--cased", help="Train a tokenizer that keeps case and accents.")
    ] = False,
    units: Annotated[
        Path | None,
        typer.Option(help="Phrases to mask as one: .jsonl, or .tsv with one in the first column."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Part of the documents that is kept for validation.")
    ] = 0.01,
    sentences: Annotated[
        str, typer.Option(help="auto splits paragraphs; lines takes every line for a sentence.")
    ] = "auto",
    text_field: Annotated[
        str | None, typer.Option(help="Field or column of the text; guessed unless given.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad input, and count it.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenise; one a CPU.", min=1)
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in one file.", min=1)] = 1 << 24,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where OUT holds a corpus.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Turn text of any size into token ids for pretraining, with a tokenizer trained on it.

    In .txt a blank line ends a document. Interrupted, the same command goes on where it stopped.
    """
    from fastbert.data import prepare as run

    report = run(
        [*text, *(more or [])],
        out,
        tokenizer=tokenizer,
        lowercase=not cased,
        units=units,
        held_out=held_out,
        sentences=sentences,
        text_field=text_field,
        skip_bad=skip_bad,
        num_workers=workers,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\n{out}")
