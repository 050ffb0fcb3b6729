"""A quantised model to a folder and back."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch

from fastbert.atomic import replacing
from fastbert.compress.encoder import QuantizedEncoder
from fastbert.compress.model import QuantizedModel, Report
from fastbert.runtime import folder as layout
from fastbert.runtime import tensors
from fastbert.runtime.folder import CONFIG, FACTS, HEAD, TENSORS, TOKENIZER


def save(model: QuantizedModel, folder: Path) -> None:
    """Write ``model``: QuantizedModel.save_pretrained."""
    facts = dict(model.facts)
    arrays = dict(model.encoder.tensors)
    for name, x in model.model.state_dict().items():
        arrays[HEAD + name] = x.detach().to("cpu", torch.float32).contiguous().numpy()
    texts = {CONFIG: facts.pop("config_json"), TOKENIZER: facts.pop("tokenizer_json")}
    files = {name: text.encode() for name, text in texts.items() if text is not None}
    facts.update(
        format="fastbert",
        format_version=layout.FORMAT_VERSION,
        encoder=model.encoder.config,
        tensors=tensors.describe(arrays),
        files={name: zlib.crc32(data) for name, data in files.items()},
        scheme=model.scheme,
        report=model.report.to_dict(),
    )
    facts["crc32"] = layout.digest(facts)
    files[FACTS] = (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    # The last of them, fastbert.json, vouches for the others: should the machine stop between two
    # renames, loading says that they do not belong together.
    with replacing(*(folder / name for name in (TENSORS, *files))) as (weights, *others):
        with weights.open("wb") as file:
            tensors.write(file, arrays)
        for path, data in zip(others, files.values(), strict=True):
            path.write_bytes(data)


def load(folder: str | Path) -> QuantizedModel:
    """The quantised model that ``save_pretrained`` or ``fastbert quantize`` wrote to ``folder``.

    The weights are mapped from the file; the engine packs them at the first call. Heads need the
    library that the model came from: transformers, or none.
    Raises ValueError, naming the file, for what is missing, cut short, damaged or does not fit.
    """
    read = layout.read(folder)
    facts, report = read.facts, Report(**read.facts["report"])
    encoder = QuantizedEncoder(facts["encoder"], read.encoder_arrays())
    config_json = _text(read, CONFIG)
    if config_json is None:
        raise ValueError(f"{read.folder / FACTS}: files does not name {CONFIG}")
    heads = {name: torch.from_numpy(x.copy()) for name, x in read.head_arrays().items()}
    has_pooler = any("pooler" in name.split(".")[:2] for name in heads)
    try:
        model = _rebuild(facts, config_json, encoder, has_pooler)
        model.load_state_dict(heads, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{read.folder}: {error}") from error
    own: dict[str, Any] = {key: facts[key] for key in facts if key not in _WRITTEN_ANEW}
    own.update(config_json=config_json, tokenizer_json=_text(read, TOKENIZER))
    return QuantizedModel(model, encoder, report, own)


_WRITTEN_ANEW = (
    "format",
    "format_version",
    "encoder",
    "tensors",
    "files",
    "scheme",
    "report",
    "crc32",
)


def _text(read: layout.SavedModel, name: str) -> str | None:
    data = read.file(name)
    return None if data is None else data.decode()


def _rebuild(facts: dict[str, Any], *args: Any) -> torch.nn.Module:
    if facts["library"] == "fastbert":
        from fastbert.models import quantized as native

        return native.rebuild(facts, *args)
    from fastbert.hf import quantized as foreign

    return foreign.rebuild(facts, *args)
