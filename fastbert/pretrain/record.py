"""What a run's folder tells of it: ``run.json``, what it was begun with, and its log."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.atomic import replacing
from fastbert.pretrain.fields import made
from fastbert.pretrain.options import Options
from fastbert.pretrain.setting import Setting
from fastbert.train.logging import LOG

RUN = "run.json"
_FREE = ("workers",)  # of the setting: what nothing depends on
_LENGTHS = ("steps", "minutes")


@dataclass(frozen=True)
class RunRecord:
    """What a run was begun with, to begin the same again or to go on.

    corpus: where it was.  tokenizer_sha256: of its tokenizer.  init: see ``pretrain``.
    lengthened_at: the steps behind which the run was resumed with more steps or minutes than it
        had; ``setting`` has the last word.
    """

    corpus: Path
    tokenizer_sha256: str
    init: Path | None
    options: Options
    setting: Setting
    lengthened_at: tuple[int, ...] = ()

    @classmethod
    def read(cls, out: str | Path) -> RunRecord:
        """Of the run in a folder. Raises ValueError where there is none."""
        path = Path(out) / RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"out: {out} holds no run to resume: {RUN} is not there") from None
        return cls(
            corpus=Path(found["corpus"]),
            tokenizer_sha256=found["tokenizer_sha256"],
            init=None if found["init"] is None else Path(found["init"]),
            options=Options.from_json(json.dumps(found["options"])),
            setting=made(Setting, found["setting"]),
            lengthened_at=tuple(found.get("lengthened_at", ())),
        )

    def write(self, out: Path) -> None:
        text = {
            "corpus": str(self.corpus),
            "tokenizer_sha256": self.tokenizer_sha256,
            "init": None if self.init is None else str(self.init),
            "options": json.loads(self.options.to_json()),
            "setting": dataclasses.asdict(self.setting),
            "lengthened_at": self.lengthened_at,
        }
        with replacing(out / RUN) as (path,):
            path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

    def check(self, other: RunRecord) -> None:
        """Raises ValueError, naming what differs, unless ``other`` goes on with this run: from any
        place, with any number of workers, and for as long or longer."""
        if other.tokenizer_sha256 != self.tokenizer_sha256:
            raise ValueError(f"corpus: {other.corpus} has another tokenizer than the run")
        found = _differences(other.options, self.options)
        if other.init != self.init:
            found.append(_difference("init", other.init, self.init))
        for name in _LENGTHS:
            new, old = getattr(other.setting, name), getattr(self.setting, name)
            if (new is None) != (old is None) or (new is not None and new < old):
                expected = "None" if old is None else f"{old} or more"
                found.append(f"{name} (got {new}, expected {expected})")
        found += _differences(other.setting, self.setting, without=(*_LENGTHS, *_FREE))
        if found:
            raise ValueError(
                f"resume: a run goes on as it was begun, but for its length: {', '.join(found)}"
            )


def _differences(given: Any, begun: Any, without: tuple[str, ...] = ()) -> list[str]:
    """The fields of two dataclasses that differ, with both values; those of a dataclass in them by
    their own names."""
    found = []
    for field in dataclasses.fields(given):
        new, old = getattr(given, field.name), getattr(begun, field.name)
        if field.name in without or new == old:
            continue
        if dataclasses.is_dataclass(new):
            found += [f"{field.name}.{inner}" for inner in _differences(new, old)]
        else:
            found.append(_difference(field.name, new, old))
    return found


def _difference(name: str, new: Any, old: Any) -> str:
    return f"{name} (got {new}, it has {old})"


def noted(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in the log of a run; none where there is no log."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # The last one may be cut short, in a run that was killed.
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == kind]
