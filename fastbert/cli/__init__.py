"""The command line: one file a sub-command, each a thin face of one public function."""

from __future__ import annotations

import sys

import typer

from fastbert.cli.demo import demo
from fastbert.cli.doctor import doctor
from fastbert.cli.encode import encode
from fastbert.cli.evaluate import evaluate, predict
from fastbert.cli.finetune import finetune
from fastbert.cli.prepare import prepare
from fastbert.cli.pretrain import pretrain
from fastbert.cli.quantize import quantize

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A fast BERT encoder on hand-written kernels, and a drop-in for Hugging Face models.",
)
app.command()(doctor)
app.command()(demo)
app.command()(quantize)
app.command()(encode)
app.command()(prepare)
app.command()(pretrain)
app.command()(finetune)
app.command()(evaluate)
app.command()(predict)


@app.callback()
def _root() -> None:
    """Keeps sub-commands sub-commands whatever their number."""


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"fastbert: {error}", file=sys.stderr)
        sys.exit(2)
