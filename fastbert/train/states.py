"""A model's and an optimiser's state as named tensors, whole even where ranks hold shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastbert.train.parameters import is_sharded

Tensor = torch.Tensor


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself inside DDP's and torch.compile's wrappers: its names are the user's."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def whole(x: Any) -> Tensor:
    """All of ``x`` on CPU, contiguous; a collective call where it is sharded."""
    x = x.detach()
    return (x.full_tensor() if is_sharded(x) else x).cpu().contiguous()


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by name, and alias -> name for further names of one tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    # keep_vars: two names of one parameter give one object.
    for name, x in unwrapped(model).state_dict(keep_vars=True).items():
        if id(x) in names:
            aliases[name] = names[id(x)]
        else:
            names[id(x)] = name
            tensors[name] = whole(x)
    return tensors, aliases


def check_model(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], source: Path
) -> None:
    """Raises ValueError that lists what of the checkpoint does not fit the model."""
    wanted = {name: x.shape for name, x in unwrapped(model).state_dict(keep_vars=True).items()}
    saved = {name: x.shape for name, x in _with_aliases(tensors, aliases).items()}
    problems = [f"missing: {name}" for name in wanted if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in wanted]
    problems += [
        f"wrong shape: {name} is {tuple(saved[name])}, expected {tuple(shape)}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        raise ValueError("\n  ".join([f"model: {source} does not fit it:", *problems]))


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Copy the tensors, which ``check_model`` has seen, into the model's own."""
    saved = _with_aliases(tensors, aliases)
    with torch.no_grad():
        for name, x in unwrapped(model).state_dict(keep_vars=True).items():
            x.copy_(_like(saved[name], x))


def _with_aliases(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    return {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}


def _like(x: Tensor, other: Any) -> Tensor:
    """``x`` sharded as ``other`` is."""
    if not is_sharded(other):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements)


def _names(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> its name."""
    return {id(p): name for name, p in unwrapped(model).named_parameters()}


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state's tensors as "NAME/SLOT", and the groups with names in place of parameters.

    A number that a GPU holds, as learning rates there, becomes a float.
    Raises ValueError for a parameter that is none of the model's.
    """
    if optimizer is None:
        return {}, []
    names = _names(model)
    tensors, groups = {}, []
    for group in optimizer.param_groups:
        foreign = sum(id(p) not in names for p in group["params"])
        if foreign:
            raise ValueError(f"optimizer: got {foreign} parameters that are none of the model's")
        settings = {
            key: float(value) if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        groups.append({**settings, "params": [names[id(p)] for p in group["params"]]})
        for p in group["params"]:
            for slot, value in optimizer.state.get(p, {}).items():
                tensors[f"{names[id(p)]}/{slot}"] = whole(torch.as_tensor(value))
    return tensors, groups


def optimizer_state_dict(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    source: Path,
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, in the order of its own parameters.

    A group of the optimizer takes its settings from the saved group that holds its parameters, so
    groups may be cut otherwise than they were, but not joined from unlike ones.
    Raises ValueError for parameters that the checkpoint lacks or that have other settings there.
    """
    names = _names(model)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, slot = key.rpartition("/")
        by_parameter.setdefault(name, {})[slot] = x
    settings = {
        name: {key: _from_json(value) for key, value in group.items() if key != "params"}
        for group in groups
        for name in group["params"]
    }
    state: dict[int, dict[str, Tensor]] = {}
    packed: list[dict[str, Any]] = []
    index = 0
    for group in optimizer.param_groups:
        members = [names.get(id(p)) for p in group["params"]]
        missing = [name for name in members if name not in settings]
        if missing:
            raise ValueError(f"optimizer: {source} has no state for {missing[0]}")
        found = [settings[name] for name in members if name is not None]
        if any(one != found[0] for one in found):
            raise ValueError(
                f"optimizer: {source} has unlike settings for the parameters of one group, such as "
                f"{members[0]}"
            )
        numbers = range(index, index + len(members))
        index += len(members)
        packed.append({**(found[0] if found else group), "params": list(numbers)})
        for number, member, p in zip(numbers, members, group["params"], strict=True):
            slots = by_parameter.get(str(member), {})
            state[number] = {
                slot: _like(x, p) if x.shape == p.shape else x for slot, x in slots.items()
            }
    return {"state": {number: slots for number, slots in state.items() if slots},
            "param_groups": packed}  # fmt: skip


def _from_json(value: Any) -> Any:
    """JSON has no tuples: betas come back as a list."""
    return tuple(value) if isinstance(value, list) else value
