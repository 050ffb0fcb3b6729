"""The folder of a saved model, read: fastbert.json and the files that it vouches for.

fastbert.json names every tensor and carries a CRC-32 of each, of the other files, and of itself.
That finds a file that was cut short, mixed with another or damaged on its way, not a forger.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.runtime.tensors import MappedTensors, entries

FACTS = "fastbert.json"
CONFIG = "config.json"
TENSORS = "model.safetensors"
TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 1
HEAD = "head."  # prefix of the heads' tensors
POOLINGS = ("mean", "cls", "max", "pooler")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class MissingModelError(FileNotFoundError, ValueError):
    """No saved model is where it was looked for."""


def digest(facts: Mapping[str, Any]) -> int:
    """CRC-32 of the facts without the one that is it."""
    rest = {key: value for key, value in facts.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _is_linear(x: Any) -> bool:
    """[name, activation]"""
    return isinstance(x, list) and len(x) == 2 and all(isinstance(part, str) for part in x)


def _is_encoder(x: Any) -> bool:
    return (
        isinstance(x, dict)
        and x.keys() == {"head_dim", "layer_norm_eps", "activation", "layers"}
        and type(x["head_dim"]) is int
        and x["head_dim"] > 0
        and isinstance(x["layer_norm_eps"], float)
        and x["activation"] in ACTIVATIONS
        and isinstance(x["layers"], list)
        and all(map(_is_count, x["layers"]))
    )


def _is_head(x: Any) -> bool:
    if not isinstance(x, dict) or x.keys() != {"task", "takes", "steps", "pooler"}:
        return False
    steps = x["steps"]
    return (steps is None or (isinstance(steps, list) and all(map(_is_linear, steps)))) and (
        x["pooler"] is None or _is_linear(x["pooler"])
    )


def _maps_to_text(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(value, str) for value in x.values())


# Every fact beside the tensors -> what it has to be, and the check of that.
_FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scheme": ("a text", lambda x: isinstance(x, str)),
    "library": ("fastbert or transformers", lambda x: x in ("fastbert", "transformers")),
    "class": ("a text", lambda x: isinstance(x, str)),
    "family": ("a text", lambda x: isinstance(x, str)),
    "encoder": ("head_dim, layer_norm_eps, activation and layers", _is_encoder),
    "head": ("task, takes, steps and pooler", _is_head),
    "position_offset": ("a count", _is_count),
    "labels": (
        "a list of texts",
        lambda x: isinstance(x, list) and _maps_to_text(dict(enumerate(x))),
    ),
    "problem_type": ("a text or null", lambda x: x is None or isinstance(x, str)),
    "max_length": ("a count", _is_count),
    "pooling": (f"one of {', '.join(POOLINGS)}", lambda x: x in POOLINGS),
    "normalize": ("true or false", lambda x: isinstance(x, bool)),
    "lower_case": ("true or false", lambda x: isinstance(x, bool)),
    "prompts": ("texts by name", _maps_to_text),
    "default_prompt": ("a text or null", lambda x: x is None or isinstance(x, str)),
    "files": ("CRC-32 by name", lambda x: isinstance(x, dict)),
    "report": ("an object", lambda x: isinstance(x, dict)),
}


@dataclass(frozen=True)
class SavedModel:
    """A folder that ``save_pretrained`` wrote.

    facts: what fastbert.json says.  tensors: views of the mapped file.
    """

    folder: Path
    facts: dict[str, Any]
    tensors: MappedTensors

    def encoder_arrays(self) -> dict[str, Any]:
        return {n: x for n, x in self.tensors.arrays.items() if not n.startswith(HEAD)}

    def head_arrays(self) -> dict[str, Any]:
        """The tensors of the heads, by the names of the model's own parameters."""
        arrays = self.tensors.arrays.items()
        return {name.removeprefix(HEAD): x for name, x in arrays if name.startswith(HEAD)}

    def file(self, name: str) -> bytes | None:
        """The bytes of another file of the model; None if it has none of that name."""
        if name not in self.facts["files"]:
            return None
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingModelError(f"{path}: missing, and {FACTS} names it") from None
        if zlib.crc32(data) != self.facts["files"][name]:
            raise ValueError(f"{path}: is not the file that was saved: its CRC-32 is another")
        return data


def read(folder: str | Path) -> SavedModel:
    """The saved model in ``folder``, all its tensors checked.

    Raises ValueError that names the file, what is wrong with it and what was expected; it is a
    FileNotFoundError too where a file is missing.
    """
    folder = Path(folder)
    path = folder / FACTS
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingModelError(
            f"{path}: no such file, expected a folder that save_pretrained of a quantised model or "
            "`fastbert quantize` wrote"
        ) from None
    facts = _facts(path, text)
    tensors_path = folder / TENSORS
    if not tensors_path.is_file():
        raise MissingModelError(f"{tensors_path}: no such file")
    try:
        expected = entries(facts["tensors"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return SavedModel(folder, facts, MappedTensors(tensors_path, expected))


def _facts(path: Path, text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != "fastbert":
        raise ValueError(f"{path}: expected an object with format: fastbert")
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if facts.get("crc32") != digest(facts):
        raise ValueError(f"{path}: was changed or damaged: its crc32 is not that of its content")
    if "tensors" not in facts:
        raise ValueError(f"{path}: lacks tensors")
    for name, (expected, accepts) in _FACTS.items():
        if name not in facts or not accepts(facts[name]):
            raise ValueError(f"{path}: {name} is {facts.get(name)!r}, expected {expected}")
    return facts
