"""The models that ``bench/model.py`` times beside each other, with the same random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import masked_lm
import torch
from masked_lm import Shape
from problem import found, lengths_of

import fastbert

Tensor = torch.Tensor
Batch = dict[str, Tensor]

MODES = {"torch.compile": None, "torch.compile, reduce-overhead": "reduce-overhead"}
OURS_COMPILED = "fastbert, torch.compile"  # around an accelerated model: one graph for all masks


def make_batch(shape: Shape, where: str) -> tuple[Batch, list[int]]:
    """Padded inputs as a tokenizer would give them, and how many of each row are real."""
    lengths = lengths_of(shape.kind, shape.sequences, shape.longest)
    width = max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (shape.sequences, width), generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: x.to(where) for name, x in batch.items()}, lengths


def config_of(size: str) -> fastbert.BertConfig:
    return fastbert.BertConfig(**_fields(size))


def _fields(size: str) -> dict[str, Any]:
    layers, hidden, heads, inner = masked_lm.SIZES[size]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


def build(name: str, model: str, attention: str, where: str, dtype: torch.dtype, size: str) -> Any:
    """A Hugging Face BERT of class ``model`` with random weights, the same ones every time."""
    import transformers

    config = transformers.BertConfig(attn_implementation=attention, num_labels=3, **_fields(size))
    torch.manual_seed(0)
    with torch.device(where):
        module = getattr(transformers, model)(config).to(dtype)
    return fastbert.accelerate(module) if name.startswith("fastbert") else module


def candidates(
    model: str, where: str, dtype: torch.dtype, peers: tuple[str, ...], size: str
) -> dict[str, Any]:
    """name -> module: ours and the named peers, all with the same weights."""
    made = {}
    for name in ("fastbert", *peers):
        attention = "eager" if name == "HF eager" else "sdpa"
        module = build(name, model, attention, where, dtype, size)
        if name in MODES:
            module = torch.compile(module, dynamic=False, mode=MODES[name])
        elif name == OURS_COMPILED:
            module = torch.compile(module, fullgraph=True)
        made[name] = module
    return made


Call = Callable[[Batch, fastbert.PackedBatch], Tensor]


def encoders(size: str, where: str, dtype: torch.dtype) -> tuple[dict[str, Call], dict[str, str]]:
    """More of ours, and int8 peers: name -> call that gives the hidden states, padded or packed;
    and why the rest could not be made. Only on a GPU."""
    if where != "cuda":
        return {}, {}
    plain = build("HF", "BertModel", "sdpa", where, dtype, size).eval()
    makers: dict[str, Callable[[], Call]] = {
        "fastbert, graphs": lambda: _recorded(plain, size, where, dtype)
    }
    if dtype == torch.bfloat16:
        makers["fastbert, int8"] = lambda: _int8(plain, where)
        makers["torchao int8, compiled"] = lambda: _torchao(plain)
    calls, broken = {}, {}
    for name, make in makers.items():
        try:
            calls[name] = make()
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return calls, broken


def _recorded(plain: Any, size: str, where: str, dtype: torch.dtype) -> Call:
    with torch.device(where):
        own = fastbert.BertModel(config_of(size)).to(dtype).eval()
    own.load_state_dict(plain.state_dict())
    recorded = fastbert.graphs(own)
    return lambda batch, packed: recorded(packed).last_hidden_state


def _int8(plain: Any, where: str) -> Call:
    int8 = fastbert.quantize(copy.deepcopy(plain).float().cpu()).to(where)
    return lambda batch, packed: int8(**batch).last_hidden_state


def _torchao(plain: Any) -> Call:
    quantize, config = (
        found(f"torchao.quantization:{name}")
        for name in ("quantize_", "Int8DynamicActivationInt8WeightConfig")
    )
    if quantize is None or config is None:
        raise ImportError("torchao is not installed")
    peer = copy.deepcopy(plain)
    quantize(peer, config())
    compiled = torch.compile(peer, dynamic=False)
    return lambda batch, packed: compiled(**batch).last_hidden_state
