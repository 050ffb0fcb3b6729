"""Hugging Face folders: read with every key accounted for, and written whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastbert.atomic import replacing
from fastbert.config import BertConfig

if TYPE_CHECKING:
    from fastbert.models.bert import BertPreTrained

_log = logging.getLogger("fastbert")

Tensor = torch.Tensor
Model = TypeVar("Model", bound="BertPreTrained")

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = ".index.json"
# In the order in which they are looked for; the second of each pair lists shards.
_WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + INDEX, PICKLED, PICKLED + INDEX)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
DEFAULT_SHARD_BYTES = 5 * 10**9

# Modules that a task adds to the encoder. A model may lack the checkpoint's, and bring its own.
_HEADS = ("bert.pooler", "cls.predictions", "cls.seq_relationship", "classifier", "qa_outputs")
_TASK_HEADS = tuple(head + "." for head in _HEADS if head != "bert.pooler")
_BODY = ("embeddings.", "encoder.", "pooler.")
# Buffers that older versions of transformers saved among the weights.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# What Google's TensorFlow code called the LayerNorm's parameters.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class MissingCheckpointError(FileNotFoundError, ValueError):
    """No checkpoint is where it was looked for."""


def load(
    cls: type[Model],
    folder: str | Path,
    dtype: torch.dtype | None,
    config_changes: Mapping[str, Any],
    new_head: bool = False,
) -> Model:
    """A ``cls`` with the config and weights of ``folder``: BertPreTrained.from_pretrained."""
    folder = Path(folder)
    config = load_config(folder).replace(**config_changes)
    file, stored = read_weights(folder)
    if new_head:
        stored = {name: x for name, x in stored.items() if not name.startswith(_TASK_HEADS)}
    with torch.device("meta"):
        model = cls(config)
    tensors = _with_names_of(model, file, stored)
    new_heads = _account_for(model, file, tensors, logging.INFO if new_head else logging.WARNING)
    _allocate(model, dtype or _common_dtype(tensors))
    for head in new_heads:
        model.initialise(model.get_submodule(head))
    model.tie_weights()  # after a new head was filled: from here on its decoder is the embeddings
    # The files are mapped, not read: each tensor goes once from the page cache to its parameter.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    model.source_folder = folder
    return model.eval()


def load_config(folder: Path) -> BertConfig:
    """The BertConfig of a folder."""
    if not folder.is_dir():
        raise MissingCheckpointError(
            f"{folder}: no such folder. fastbert reads folders with {CONFIG} and {SAFETENSORS}, as "
            "save_pretrained and huggingface-cli download make them; it downloads nothing"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise MissingCheckpointError(f"{folder}: holds no {CONFIG}")
    return BertConfig.from_json(path)


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that was found, and all tensors by their names in it."""
    for name in _WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(INDEX):
            return path, _read_file(path)
        tensors: dict[str, Tensor] = {}
        for shard in _shards(path):
            tensors.update(_read_file(shard))
        return path, tensors
    raise MissingCheckpointError(f"{folder}: holds no weights: none of {', '.join(_WEIGHT_FILES)}")


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, in order."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards: {error!r}") from error
    outside = sorted(str(name) for name in names if Path(str(name)).name != name)
    if outside:
        raise ValueError(f"{index}: lists files outside its folder: {', '.join(outside)}")
    shards = [index.parent / name for name in sorted(names)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise MissingCheckpointError(f"{index}: lists files that are missing: {', '.join(missing)}")
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, as views of the mapped file where its format allows."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # not so for torch < 1.6
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from error
    except Exception as error:  # unpickling what is damaged fails in many ways
        raise ValueError(f"{path}: damaged, cut short or not a file of weights: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: expected a dict of tensors")
    return tensors


def _with_names_of(
    model: BertPreTrained, file: Path, stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors under the names of ``model``: prefix, old names, buffers and ties settled."""
    inner = isinstance(getattr(model, "bert", None), torch.nn.Module)
    tensors: dict[str, Tensor] = {}
    for stored_name, tensor in stored.items():
        name = stored_name
        for old, new in _OLD_NAMES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        bare = name.removeprefix("bert.")
        if bare in _BUFFERS:
            continue
        if bare.startswith(_BODY):
            name = "bert." + bare if inner else bare
        if name in tensors:
            raise ValueError(f"{file}: holds {name} twice, once as {stored_name}")
        tensors[name] = tensor
    if model.config.tie_word_embeddings:
        for alias, owner in model.tied.items():
            _settle_tie(file, tensors, alias, owner)
    return tensors


def _settle_tie(file: Path, tensors: dict[str, Tensor], alias: str, owner: str) -> None:
    """Of two names for one parameter keep ``owner``."""
    copy = tensors.pop(alias, None)
    if copy is None:
        return
    kept = tensors.setdefault(owner, copy)
    if kept is not copy and not torch.equal(kept, copy):
        raise ValueError(
            f"{file}: {alias} differs from {owner}, though tie_word_embeddings makes them one; "
            "load with tie_word_embeddings=False to keep both"
        )


def _account_for(
    model: BertPreTrained, file: Path, tensors: dict[str, Tensor], level: int
) -> list[str]:
    """Check that names and shapes are the model's, but for heads; returns those to initialise, each
    of which is a message of this ``level``."""
    tied = model.tied if model.config.tie_word_embeddings else {}
    wanted = {name: p.shape for name, p in model.state_dict().items() if name not in tied}
    heads = [head if hasattr(model, "bert") else head.removeprefix("bert.") for head in _HEADS]
    new_heads = []
    for head in heads:
        in_model = {name for name in wanted if name.startswith(head + ".")}
        in_file = {name for name in tensors if name.startswith(head + ".")}
        if in_model and not in_file:
            _log.log(level, "%s: holds no %s: initialised at random, to be trained", file, head)
            new_heads.append(head)
            for name in in_model:
                del wanted[name]
        elif in_file and not in_model:
            _log.info("%s: its %s is not part of %s", file, head, type(model).__name__)
            for name in in_file:
                del tensors[name]
    problems = [
        *(
            f"missing: {name} {tuple(shape)}"
            for name, shape in wanted.items()
            if name not in tensors
        ),
        *(
            f"unexpected: {name} {tuple(t.shape)}"
            for name, t in tensors.items()
            if name not in wanted
        ),
        *(
            f"wrong shape: {name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ),
    ]
    if problems:
        raise ValueError("\n  ".join([f"{file}: does not fit {type(model).__name__}:", *problems]))
    return new_heads


def _allocate(model: BertPreTrained, dtype: torch.dtype) -> None:
    """Parameters on CPU, still to be filled, in place of those on the meta device.

    As nn.Module.to_empty, which makes torch import its symbolic shapes (2 seconds, 30 MB) for it.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(empty))


def _common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The dtype of the floating tensors if they share one, else fp32."""
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def save(model: BertPreTrained, folder: str | Path, max_shard_size: int) -> None:
    """Write ``model`` to ``folder``: BertPreTrained.save_pretrained."""
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size: got {max_shard_size}, expected a number of bytes >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.tied if model.config.tie_word_embeddings else {}
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    extra = {**model.config.extra, "dtype": str(_common_dtype(tensors)).removeprefix("torch.")}
    extra.pop("torch_dtype", None)  # what dtype was called before
    config = model.config.replace(architectures=(type(model).__name__,), extra=extra)
    shards = _split(tensors, max_shard_size)
    for name, shard in shards.items():
        with replacing(folder / name) as (path,):
            save_file(shard, path, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_text(folder / (SAFETENSORS + INDEX), _index(shards))
    _remove_other_weights(folder, shards)
    _write_text(folder / CONFIG, config.to_json())
    _copy_tokenizer(model.source_folder, folder)


def _split(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, each file at most ``limit`` bytes or a single tensor."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}


def _index(shards: dict[str, dict[str, Tensor]]) -> str:
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    values = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _remove_other_weights(folder: Path, shards: Mapping[str, object]) -> None:
    """Remove what an earlier save left and readers would prefer to, or take for, this one."""
    keep = {*shards, SAFETENSORS + INDEX} if len(shards) > 1 else set(shards)
    for pattern in (SAFETENSORS, SAFETENSORS + INDEX, "model-*-of-*.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink()


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    if source is None or source.resolve() == folder.resolve():
        return
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            with replacing(folder / name) as (path,):
                shutil.copyfile(source / name, path)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
