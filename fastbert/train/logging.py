"""Log: what a run notes of itself, in a file and, if asked, where TensorBoard or W&B show it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing

LOG = "log.jsonl"
TRACKERS = ("tensorboard", "wandb")
"""What can show a run; each is the name of its package too."""

_WANDB_RUN = "wandb.json"


class Log:
    """The notes of one run, a JSON object a line, in ``folder / "log.jsonl"``.

    tracker: "tensorboard" writes every number into event files in ``folder / "tensorboard"`` too,
        "wandb" to Weights & Biases (whose WANDB_* variables say where and whether at all); None
        neither.
    settings: of the run, for W&B's page of it.
    active: False for the ranks that are to write nothing.
    Raises ValueError for an unknown tracker, ModuleNotFoundError for one that is not installed.
    """

    def __init__(
        self,
        folder: Path,
        tracker: str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        active: bool = True,
    ) -> None:
        check_tracker(tracker)
        self.path = folder / LOG
        self._tracker, self._settings, self._active = tracker, dict(settings or {}), active
        self._shown: _TensorBoard | _WandB | None = None

    def begin(self, step: int) -> None:
        """Go on behind ``step``, 0 for a new run: what was noted of later ones is going to be done
        again. (W&B keeps it, and keeps the first of two notes of a step.)"""
        if not self._active:
            return
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            with replacing(self.path) as (temporary,):
                temporary.write_text("".join(kept), encoding="utf-8")
        folder = self.path.parent
        if self._tracker == "tensorboard":
            self._shown = _TensorBoard(folder / "tensorboard", step)
        elif self._tracker == "wandb":
            self._shown = _WandB(folder, self._settings)

    def write(self, step: int, kind: str, **values: Any) -> dict[str, Any]:
        """Note values of a step, numbers and dicts of them, and return the line.

        kind: what they are of, such as "train". Raises OSError where the file cannot be written.
        """
        line = {"step": step, "kind": kind, **values}
        if not self._active:
            return line
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # that of a full disk does not tell the file
            raise OSError(f"{self.path}: step {step} could not be noted: {error}") from error
        if self._shown is not None:
            self._shown.write(step, dict(_scalars(kind, values)))
        return line

    def close(self) -> None:
        """Finish what trackers have begun; twice does no harm."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None


def check_tracker(name: str | None) -> None:
    """Raises ValueError for an unknown tracker, ModuleNotFoundError for one not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"log: got {name!r}, expected one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"log: {name} needs a package that is not installed: pip install {name}"
        )


def _scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """``kind/name`` and number, through dicts in dicts; one that is called as the kind is
    not named twice."""
    for name, value in values.items():
        tag = name if name == kind else f"{kind}/{name}"
        if isinstance(value, Mapping):
            yield from _scalars(tag, value)
        elif isinstance(value, int | float):
            yield tag, value


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(folder, purge_step=step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        known = folder / _WANDB_RUN
        if not known.exists():
            with replacing(known) as (temporary,):
                temporary.write_text(json.dumps({"id": uuid.uuid4().hex}), encoding="utf-8")
        identity = json.loads(known.read_text(encoding="utf-8"))["id"]
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project="fastbert", name=folder.resolve().name, id=identity, resume="allow",
            dir=str(folder), config=settings,
        )  # fmt: skip

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()
