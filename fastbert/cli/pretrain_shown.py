"""What ``fastbert pretrain`` shows: the lists of what there is, and the progress of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_list() -> None:
    """Every objective, way of masking, source and preset, with its paper."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.pretrain import OBJECTIVES, PRESETS, SOURCES
    from fastbert.pretrain.masking import MASK_TOKENS, WHAT
    from fastbert.pretrain.spans import SPANS

    def entries(table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        return [(name, entry.summary, entry.paper) for name, entry in table.items()]

    def pairs(table: Mapping[str, tuple[str, str]]) -> list[tuple[str, str, str]]:
        return [(name, what, paper) for name, (paper, what) in table.items()]

    console = Console()
    for title, rows in (
        ("objectives (--objective), joined by +", entries(OBJECTIVES)),
        ("what is masked (--mask)", pairs(WHAT)),
        ("lengths of masked spans, in words (--span)", pairs(SPANS)),
        ("what masked tokens become (--replace)", pairs(MASK_TOKENS)),
        ("how text is cut into sequences (--source)", entries(SOURCES)),
        ("presets (--preset)", entries(PRESETS)),
    ):
        table = Table(title=title, title_justify="left", box=None)
        for heading in ("name", "what", "paper"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


class Shown:
    """What a run tells, on stderr: where it starts, and a progress bar with the losses, what is
    right, the rate and the time that is left.

    is_main_process: False in the other ranks, which show nothing.
    """

    def __init__(self, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars = Progress(
            BarColumn(20), TextColumn("{task.percentage:3.0f}%  {task.description}"),
            console=Console(stderr=True), disable=hidden,
        )  # fmt: skip
        self._task = self._bars.add_task("starting", total=1.0)
        self.is_main_process = True

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def tell(self, trainer: Any, noted: dict[str, Any]) -> None:
        self.is_main_process = trainer.accelerator.is_main_process
        if not self.is_main_process or self._bars.disable:
            return
        if noted["kind"] == "start":
            self._bars.start()  # only now is it known which rank this is
            peak = trainer.meter.peak
            self._print(f"{start_line(noted)}; MFU is of {peak.flop_s / 1e12:.4g} TFLOP/s "
                        f"({peak.source})")  # fmt: skip
            self._bars.update(self._task, completed=trainer.course.part_done)
        elif noted["kind"] == "validation":
            text = ", ".join(
                f"{name}: loss {x['loss']:.3f} (perplexity {x['perplexity']:.1f}), right "
                f"{x['accuracy']:.1%} (by chance {x['chance']:.1%})"
                for name, x in noted["validation"].items()
            )
            self._print(f"step {noted['step']:,}, held out: {text}")
        else:
            text = progress_line(noted, trainer.course.seconds_left)
            self._bars.update(self._task, completed=trainer.course.part_done, description=text)

    def _print(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True)


def start_line(noted: dict[str, Any]) -> str:
    """``step 0: 2 layers of 128, 4,385,920 parameters, 4,096 tokens an update``."""
    return (
        f"step {noted['step']:,}: {noted['layers']} layers of {noted['hidden_size']}, "
        f"{noted['parameters']:,} parameters, {noted['update_tokens']:,} tokens an update"
    )


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
