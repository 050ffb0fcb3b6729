"""Checkpoints of a run: everything that training goes on from, whole or not at all.

A checkpoint is a folder ``step-00001000`` of a run's folder:

    model.safetensors      parameters and buffers, by name
    optimizer.safetensors  "NAME/SLOT" for slot SLOT of the state of parameter NAME
    rng.safetensors        "RANK/GENERATOR", the generators of each rank
    state.json             all else, and the size and CRC-32 of the three: written last

One is whole when ``state.json`` is there, has its own CRC-32, and the others are what it says. So
whatever stops the writing, a folder that is half written is never taken for a checkpoint. No file
is a pickle.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from fastbert.atomic import replacing, sync
from fastbert.train import states
from fastbert.train.rng import rng_state, seed_all, set_rng_state

Tensor = torch.Tensor
_log = logging.getLogger("fastbert")

_FORMAT = 1
_MODEL, _OPTIMIZER, _RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
_STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")
_BLOCK = 1 << 20


class Loaded(NamedTuple):
    """step: of the checkpoint.  extra: what ``save`` was given."""

    step: int
    extra: dict[str, Any]


def save(
    directory: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    sampler: Any = None,
    rng: bool = True,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> Path:
    """Write the checkpoint of ``step`` and return its folder.

    directory: of the run; made if missing.
    model, optimizer: of torch, under DDP and FSDP2 too, whose shards are joined: every rank calls,
        and the first writes. The optimizer's state goes by the names of parameters.
    scheduler, sampler: anything with a ``state_dict`` of JSON values, or None.
    rng: whether to keep the states of python's, numpy's and torch's global generators.
    extra: JSON values that ``load`` gives back.
    keep: how many of the latest checkpoints to keep; None for all.
    Raises OSError where it cannot be written, as on a full disk: the earlier checkpoints are as
    they were. ValueError for values that JSON cannot hold, and for a step below 0.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step, keep: got {step}, {keep}, expected step >= 0 and keep >= 1")
    directory = Path(directory)
    tensors, aliases = states.model_tensors(model)
    moments, groups = states.optimizer_tensors(model, optimizer)
    files = {_MODEL: tensors, _OPTIMIZER: moments, _RNG: _gathered_rng() if rng else {}}
    state = {
        "format": _FORMAT,
        "step": step,
        "world_size": _world_size(),
        "aliases": aliases,
        "param_groups": groups,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "sampler": None if sampler is None else sampler.state_dict(),
        "extra": dict(extra or {}),
    }
    folder = directory / f"step-{step:08}"
    if _rank() != 0:
        return folder
    try:
        state = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"scheduler, sampler, extra: expected JSON values: {error}") from None
    try:
        _write(folder, files, state)
    except (OSError, SafetensorError) as error:
        if not (folder / _STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{folder}: this checkpoint could not be written ({error}); earlier ones are as they "
            "were"
        ) from error
    _remove_old(directory, folder, keep)
    return folder


def _write(folder: Path, files: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed here
        leftover.unlink()
    with replacing(*(folder / name for name in (*files, _STATE))) as paths:
        state["files"] = {}
        for (name, tensors), path in zip(files.items(), paths, strict=False):
            save_file(tensors, path)
            state["files"][name] = dict(zip(("size", "crc32"), _fingerprint(path), strict=True))
        state["crc32"] = _crc32(state)
        paths[-1].write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _crc32(state: Mapping[str, Any]) -> int:
    """Of JSON values, however they are written down."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _remove_old(directory: Path, newest: Path, keep: int | None) -> None:
    """Remove all but ``keep`` of the checkpoints up to ``newest``, and what was never finished."""
    older = [path for path in _folders(directory) if _step(path) <= _step(newest)]
    whole = [path for path in older if (path / _STATE).exists()]
    kept = whole if keep is None else whole[:keep]
    for path in older:
        if path not in kept:
            # First what makes it a checkpoint: a removal that is stopped leaves none that is half.
            (path / _STATE).unlink(missing_ok=True)
            shutil.rmtree(path)


def _folders(directory: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, the latest step first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def latest(directory: str | Path) -> Path | None:
    """The folder of the last whole checkpoint in ``directory``; None where there is none.

    A later one that is damaged or was never finished is passed over, with a warning. Reads the
    files from end to end.
    """
    for folder in _folders(Path(directory)):
        try:
            _verify(folder)
        except ValueError as error:
            _log.warning("%s; trying the checkpoint before it", error)
        else:
            return folder
    return None


def _verify(folder: Path) -> dict[str, Any]:
    """The state of a whole checkpoint. Raises ValueError, naming the file, if it is not whole."""
    path = folder / _STATE
    try:
        state = json.loads(path.read_bytes())
        if state.pop("crc32") != _crc32(state):
            raise ValueError("its CRC-32 is another")
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']}, expected {_FORMAT}")
        files = {name: (entry["size"], entry["crc32"]) for name, entry in state["files"].items()}
        if files.keys() != {_MODEL, _OPTIMIZER, _RNG}:
            raise ValueError(f"it lists the files {sorted(files)}")
    except FileNotFoundError:
        raise ValueError(f"{folder}: this checkpoint was never finished") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: this checkpoint is damaged: {error!r}") from None
    for name, expected in files.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name}: this checkpoint is damaged: {error}") from None
        if found != expected:
            raise ValueError(
                f"{folder / name}: this checkpoint is damaged: the file has {found[0]} bytes of "
                f"CRC-32 {found[1]:08x}, expected {expected[0]} of {expected[1]:08x}"
            )
    return state


def _fingerprint(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc32 = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            crc32 = zlib.crc32(block, crc32)
    return size, crc32


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    sampler: Any = None,
    rng: bool = True,
) -> Loaded:
    """Put ``model`` and all else that is given where the checkpoint in ``folder`` was taken.

    folder: of one checkpoint, as ``latest`` returns it. Every rank calls, in a run of as many ranks
        as then or of more or fewer; with as many, one process on CPU goes on bit by bit as if
        nothing had happened. With another number, generators start anew from the step and the rank.
    Raises ValueError for a checkpoint that is not whole, lacks something that is asked for, or does
    not fit, naming it; nothing is loaded then, unless it is the scheduler or sampler that refuses.
    """
    folder = Path(folder)
    state = _verify(folder)
    for name, wanted in (("scheduler", scheduler), ("sampler", sampler)):
        if wanted is not None and state[name] is None:
            raise ValueError(f"{name}: {folder} was saved without one, expected None")
    saved_rng = load_file(folder / _RNG)
    if rng and not saved_rng:
        raise ValueError(f"rng: {folder} was saved without generators, expected False")
    tensors = load_file(folder / _MODEL)
    states.check_model(model, tensors, state["aliases"], folder)
    if optimizer is not None:
        moments = load_file(folder / _OPTIMIZER)
        loadable = states.optimizer_state_dict(
            model, optimizer, moments, state["param_groups"], folder
        )
    states.load_model(model, tensors, state["aliases"])
    if optimizer is not None:
        optimizer.load_state_dict(loadable)
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if sampler is not None:
        sampler.load_state_dict(state["sampler"])
    if rng:
        _restore_rng(saved_rng, state)
    return Loaded(state["step"], state["extra"])


# --- ranks -------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered_rng() -> dict[str, Tensor]:
    """The states of all ranks' generators, as "RANK/GENERATOR", on every rank."""
    return {
        f"{rank}/{name}": x
        for name, mine in rng_state().items()
        for rank, x in enumerate(_gathered(mine))
    }


def _gathered(x: Tensor) -> Iterator[Tensor]:
    """``x`` of every rank, in order; sizes may differ."""
    if _world_size() == 1:
        return iter([x])
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=x.dtype, device=device)
    padded[: len(x)] = x.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return (part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True))


def _restore_rng(saved: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    if state["world_size"] != _world_size():
        seed_all(state["step"], _rank())
        return
    prefix = f"{_rank()}/"
    set_rng_state({k.removeprefix(prefix): x for k, x in saved.items() if k.startswith(prefix)})
