"""What stands in for a module's ``forward``: one object on one instance, never a patched class.

``nn.Module.__call__`` looks ``forward`` up on the instance first, so a callable stored there is
what runs, with all hooks around it as before. The object is plain data (a module, a family's name,
a few flags): it is copied, pickled and moved with its module.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from fastbert.hf.families import FAMILIES, Family
from fastbert.ops import BackendError

_log = logging.getLogger("fastbert")


class Replacement:
    """The base of the three replacements: of a layer, of a bare model and of a task model.

    active: False hands every call to the original forward, uncounted.
    strict: True raises where a call would take the original forward.
    fallbacks: reason -> how often a call took the original forward, or a part of it. In a graph of
        torch.compile that is counted once, when the graph is traced.
    breaks: reason -> how often a call under torch.compile ran between two graphs.
    """

    def __init__(self, module: nn.Module, family: Family, strict: bool = False) -> None:
        self.module = module
        self.family_name = family.name
        self.strict = strict
        self.active = True
        self.fallbacks: dict[str, int] = {}
        self.breaks: dict[str, int] = {}

    @property
    def family(self) -> Family:
        return FAMILIES[self.family_name]

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original bound method: Hugging Face's Trainer keeps columns by it."""
        cls: Any = type(self.module)
        return _bound_signature(cls)

    @property
    def __code__(self) -> CodeType:
        """That of the original: torch.export reads it off a module's forward."""
        return type(self.module).forward.__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def obstacle(self) -> str | None:
        """Why every call takes the original forward as things are now; None when it does not."""
        return None

    def left(self) -> list[str]:
        """The parts that run as Hugging Face wrote them inside a fused call."""
        return []

    def note(self, reason: str) -> None:
        """Count a call that is not fused and say so once; an error in strict mode."""
        if self.strict:
            name = type(self.module).__name__
            raise BackendError(f"{name}: strict mode, and the call cannot be fused: {reason}")
        self._count(reason)

    def between_graphs(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that torch.compile meets and cannot make part of a graph: as it is without it.

        An error of torch.compile with fullgraph=True, after the reason has been logged.
        """
        self._say("runs between two graphs of torch.compile", reason)
        return self._outside(reason, args, kwargs)

    @torch.compiler.disable(reason="fastbert has logged why this call is no part of a graph")
    def _outside(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.breaks[reason] = self.breaks.get(reason, 0) + 1
        call: Any = self
        return call(*args, **kwargs)

    # To torch.compile these two are constants: they run when a graph is traced, and no guard looks
    # at the counts, which change with every call.

    @torch.compiler.assume_constant_result
    def _count(self, reason: str) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
        self._say("takes Hugging Face's own path", reason)

    @torch.compiler.assume_constant_result
    def _say(self, what: str, reason: str) -> None:
        _warn_once(type(self.module).__name__, what, reason)

    def install(self) -> None:
        attributes = self.module.__dict__
        attributes["forward"] = attributes["_fastbert"] = self
        attributes["_replicate_for_data_parallel"] = self.replicate

    def remove(self) -> None:
        """Take this off its module; where another library has wrapped it since, only step aside."""
        self.active = False
        attributes = self.module.__dict__
        if attributes.get("forward") is self:
            del attributes["forward"]
        for name in ("_fastbert", "_replicate_for_data_parallel"):
            attributes.pop(name, None)

    def replicate(self) -> nn.Module:
        """For ``nn.DataParallel``: a replica of the module whose forward serves that replica."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        twin = copy.copy(self)
        twin.module = replica
        replica.__dict__["forward"] = replica.__dict__["_fastbert"] = twin
        return replica


def replacement_of(module: nn.Module) -> Replacement | None:
    """The replacement on ``module``, also where another library has wrapped its forward since."""
    return module.__dict__.get("_fastbert")


@functools.cache
def _warn_once(name: str, what: str, reason: str) -> None:
    _log.warning("%s %s: %s", name, what, reason)


@functools.cache
def _bound_signature(cls: Any) -> inspect.Signature:
    signature = inspect.signature(cls.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@torch.compiler.assume_constant_result
def _positional_names(cls: Any) -> tuple[str, ...]:
    return _cached_names(cls)


@functools.cache
def _cached_names(cls: Any) -> tuple[str, ...]:
    parameters = _bound_signature(cls).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``'s own forward, by name."""
    cls: Any = type(module)
    names = _positional_names(cls)
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, {len(args)} were given")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise TypeError(f"forward got multiple values for argument {name!r}")
        given[name] = value
    return given
