"""Fields of dataclasses from plain data, such as JSON holds: names and kinds are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def names(kind: type) -> set[str]:
    """Of the fields of a dataclass."""
    return {field.name for field in dataclasses.fields(kind)}


def made(kind: type, values: Any) -> Any:
    """A ``kind``, a dataclass, of values by name; fields that are dataclasses are objects in these.

    Raises ValueError for what is no object, for unknown names, and for values of another kind.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"got a {type(values).__name__}, expected an object")
    return kind(**fitted(kind, values))


def fitted(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the fields of ``kind`` have them: tuples for lists, dataclasses for objects.

    Raises ValueError as ``made`` does.
    """
    if unknown := values.keys() - names(kind):
        known = ", ".join(sorted(names(kind))) or "no options"
        raise ValueError(f"got {', '.join(sorted(unknown))}, expected some of {known}")
    hints = get_type_hints(kind) if values else {}
    return {name: _fit(name, value, hints[name]) for name, value in values.items()}


def _fit(name: str, value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        inner = next(argument for argument in arguments if argument is not NoneType)
        return None if value is None else _fit(name, value, inner)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else made(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is ...:
            return tuple(_fit(name, x, arguments[0]) for x in value)
        if len(value) == len(arguments):
            return tuple(map(_fit, repeat(name), value, arguments))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _fit(f"{name}.{key}", x, arguments[1]) for key, x in value.items()}
    # JSON does not tell 1 from 1.0; True is an int for Python.
    kinds = (int, float) if hint is float else hint
    if origin is None and isinstance(value, kinds) and isinstance(value, bool) == (hint is bool):
        return value
    raise ValueError(f"{name}: got {value!r}, expected {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and dataclasses.is_dataclass(arguments[0]):
        return "a list of objects"
    if origin is tuple:
        many = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {many}{_WORDS[arguments[0]].removeprefix('a ')}s"
    return "an object" if origin is Mapping else _WORDS[hint]
