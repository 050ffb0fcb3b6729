"""``fastbert doctor``: what is built, what this machine has, and which kernel each op takes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say what is built, which instruction set and GPU are used, and which kernel each op takes."""
    from fastbert.doctor import doctor as examine

    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for section in ("versions", "cpu", "native", "gpu"):
        for name, value in report[section].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            facts.add_row(name.replace("_", " "), text)
    console.print(facts)
    for name, value in report["settings"].items():
        console.print(f"{name}={value}")
    for case in report["ops"]:
        table = Table(title=f"{case['dtype']} on {case['device']}", title_justify="left")
        for heading in ("op", "kernel", "passed over, because"):
            table.add_column(heading)
        for row in case["choices"]:
            why = "\n".join(f"{name}: {text}" for name, text in row["passed_over"].items())
            table.add_row(row["op"], row["backend"] or "none", why)
        console.print(table)
