"""Saved models: the same bits come back, and nothing damaged comes back at all."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import fastbert
from fastbert import atomic
from fastbert.compress import load, quantize
from fastbert.runtime import folder as layout

from ..hf._models import MODEL_NAMES, batch_for, tiny

FILES = ("config.json", "fastbert.json", "model.safetensors")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_hugging_face_models_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    quantised, batch = quantize(tiny(name)), batch_for(name)
    quantised.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        expected, got = quantised(**batch), again(**batch)
    assert type(got) is type(expected)
    for key, x in expected.items():
        assert torch.equal(got[key], x), key
    assert type(again.config) is type(quantised.config)
    assert again.report == quantised.report


@pytest.mark.parametrize("scheme", ["int8-dynamic", "bf16"])
def test_native_models_come_back_and_can_be_saved_again(
    scheme: str, native: Any, batches: Any, tmp_path: Path
) -> None:
    quantised = quantize(native("BertForPreTraining"), scheme, keep_float=["layers.1.up"])
    quantised.save_pretrained(tmp_path / "a")
    again = fastbert.load(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert again.config == quantised.config.replace(architectures=("BertForPreTraining",))
    with torch.no_grad():
        expected, got = quantised(batch=batches[0]), again(batch=batches[0])
    for key, x in expected.items():
        assert torch.equal(got[key], x), key
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_bare_model_without_a_pooler(tmp_path: Path) -> None:
    from transformers import BertModel

    quantised = quantize(BertModel(tiny("BertModel").config, add_pooling_layer=False).eval())
    quantised.save_pretrained(tmp_path)
    out = load(tmp_path)(input_ids=torch.ones(1, 3, dtype=torch.int64))
    assert out.pooler_output is None


def test_the_tensors_are_a_safetensors_file_with_int8_as_int8(native: Any, tmp_path: Path) -> None:
    quantised = quantize(native("BertForSequenceClassification"), keep_float=[1])
    quantised.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors["layers.0.qkv.weight"].dtype == torch.int8
    assert tensors["layers.1.qkv.weight"].dtype == torch.bfloat16
    assert tensors["embeddings.word"].dtype == torch.bfloat16
    assert tensors["head.classifier.weight"].dtype == torch.float32
    weight = quantised.model.bert.pooler.dense.weight
    assert torch.equal(tensors["head.bert.pooler.dense.weight"], weight)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def _written(native: Any, folder: Path) -> Path:
    quantize(native("BertForSequenceClassification", num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_is_a_clear_error(name: str, native: Any, tmp_path: Path) -> None:
    path = _written(native, tmp_path) / name
    good = path.read_bytes()
    rng = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little") if name.endswith("tensors") else len(good)
    places = [*rng.sample(range(min(header, len(good))), 60), *rng.sample(range(len(good)), 40)]
    damaged = [good[:place] for place in (0, 1, 7, 8, 100, len(good) - 1)]
    damaged += [good[:p] + bytes([good[p] ^ 1 << rng.randrange(8)]) + good[p + 1 :] for p in places]
    damaged += [good + b"\0", rng.randbytes(len(good))]
    for data in damaged:
        path.write_bytes(data)
        try:
            load(tmp_path)
        except ValueError as error:
            assert name in str(error) or "fastbert.json" in str(error), error
        else:
            # Only what carries no meaning may change: spaces between the tokens of JSON.
            assert name != "config.json" and b"\0" not in data[:header][-1:]
            assert json.loads(data[8:header] if name.endswith("tensors") else data) == json.loads(
                good[8:header] if name.endswith("tensors") else good
            )
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name) as caught:
        load(tmp_path)
    assert isinstance(caught.value, ValueError)


def _rewrite(folder: Path, change: Any) -> None:
    """Change the facts and vouch for them again, as a hostile or mistaken writer would."""
    path = folder / "fastbert.json"
    facts = json.loads(path.read_text())
    change(facts)
    facts["crc32"] = layout.digest(facts)
    path.write_text(json.dumps(facts))


HOSTILE = {
    "format_version": lambda facts: facts.update(format_version=2),
    "encoder": lambda facts: facts["encoder"].update(head_dim=0),
    "pooling": lambda facts: facts.update(pooling="sum"),
    "head": lambda facts: facts.update(head={"task": 1}),
    "layers": lambda facts: facts["encoder"].update(layers=[5]),
    "head_dim": lambda facts: facts["encoder"].update(head_dim=7),
    "class": lambda facts: facts.update({"class": "BertPreTrained"}),
    "embeddings.word": lambda facts: facts["tensors"]["embeddings.word"].update(shape=[96, 48]),
    "dtype": lambda facts: facts["tensors"]["embeddings.word"].update(dtype="F16"),
    "tensors": lambda facts: facts.update(tensors=[]),
    "model.safetensors": lambda facts: facts["tensors"].pop("embeddings.word"),
    "labels": lambda facts: facts.update(labels=[1, 2]),
    "files": lambda facts: facts.update(files={}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_facts_that_do_not_fit_are_errors(what: str, native: Any, tmp_path: Path) -> None:
    _rewrite(_written(native, tmp_path), HOSTILE[what])
    with pytest.raises(ValueError, match=what):
        load(tmp_path)(input_ids=torch.ones(1, 3, dtype=torch.int64))


HEADERS = {
    "longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"\xff{}}",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deeply nested": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "empty": (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("what", HEADERS)
def test_hostile_tensor_headers(what: str, native: Any, tmp_path: Path) -> None:
    _written(native, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(ValueError, match="model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 10**15], [-8, 0], [8, 8], "x", [0.5, 2], [4, 0]])
def test_hostile_offsets(offsets: Any, native: Any, tmp_path: Path) -> None:
    path = _written(native, tmp_path) / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["layers.0.up.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(ValueError, match="model.safetensors.*(layers.0.up.weight|starts at)"):
        load(tmp_path)


def test_a_save_that_fails_leaves_the_old_content(
    native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _written(native, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def full_disk(path: Path) -> None:
        if "fastbert.json" in path.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(atomic, "sync", full_disk)
    with pytest.raises(OSError, match="no space"):
        quantize(native(seed=5)).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_folder_and_a_folder_of_something_else(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="fastbert.json"):
            load(folder)
