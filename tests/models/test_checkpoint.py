"""Folders: every form that Hugging Face has written, and every way in which one can be wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastbert
from fastbert.models import checkpoint


@pytest.fixture
def hf_folder(hf_model, tmp_path):
    """A function (head, **save_pretrained arguments) -> transformers' model and its folder."""

    def make(head, changes=None, **kwargs):
        model = hf_model(head, **(changes or {}))
        model.save_pretrained(tmp_path / "hf", **kwargs)
        return model, tmp_path / "hf"

    return make


def edit(folder, change):
    """Apply ``change`` to the dict of tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rename(tensors, function):
    for name in list(tensors):
        tensors[function(name)] = tensors.pop(name)


def assert_same(ours, theirs):
    theirs = theirs.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def as_pickle(folder, shards=1):
    """Replace the safetensors file by pytorch_model.bin, as old versions wrote it."""
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    weight_map = {n: f"pytorch_model-{i % shards}.bin" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# --- Hugging Face -> ours -----------------------------------------------------------------------


def test_reads_what_transformers_saves(head, hf_folder):
    hf, folder = hf_folder(head)
    ours = getattr(fastbert, head).from_pretrained(folder)
    assert_same(ours, hf)
    assert not ours.training and all(p.requires_grad for p in ours.parameters())
    assert not any(p.is_meta for p in ours.parameters())


def test_reads_shards(hf_folder):
    hf, folder = hf_folder("BertForPreTraining", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(fastbert.BertForPreTraining.from_pretrained(folder), hf)


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_pickled_weights(shards, hf_folder):
    hf, folder = hf_folder("BertForPreTraining")
    as_pickle(folder, shards)
    assert_same(fastbert.BertForPreTraining.from_pretrained(str(folder)), hf)


def test_reads_the_oldest_pickle_format(hf_folder):
    hf, folder = hf_folder("BertModel")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(fastbert.BertModel.from_pretrained(folder), hf)


def test_never_runs_what_a_pickle_holds(hf_folder):
    class Payload:
        def __reduce__(self):
            return (os.system, ("true",))

    _, folder = hf_folder("BertModel")
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*[Ww]eights"):
        fastbert.BertModel.from_pretrained(folder)


def test_prefix_comes_and_goes(hf_folder, caplog):
    hf, folder = hf_folder("BertForPreTraining")
    bare = fastbert.BertModel.from_pretrained(folder)  # drops both heads
    assert_same(bare, hf.bert)
    bare.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = fastbert.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert_same(ours.bert, hf.bert)
    assert "holds no classifier: initialised at random" in caplog.text
    assert ours.classifier.weight.shape == (3, 32) and ours.classifier.weight.std() > 0
    assert (ours.classifier.bias == 0).all() and ours.config.id2label[2] == "LABEL_2"


def test_a_prefix_that_the_bare_model_has_too(hf_folder):
    hf, folder = hf_folder("BertModel")
    edit(folder, lambda tensors: rename(tensors, "bert.{}".format))
    assert_same(fastbert.BertModel.from_pretrained(folder), hf)


def test_a_new_masked_lm_head_is_tied_to_the_loaded_embeddings(hf_folder):
    hf, folder = hf_folder("BertModel")
    ours = fastbert.BertForMaskedLM.from_pretrained(folder)  # the pooler is dropped
    assert torch.equal(ours.bert.embeddings.word_embeddings.weight,
                       hf.embeddings.word_embeddings.weight)  # fmt: skip
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert ours.cls.predictions.transform.dense.weight.std() > 0
    assert (ours.cls.predictions.bias == 0).all()


def test_a_checkpoint_without_pooler_gets_a_new_one(hf_folder, caplog):
    _, folder = hf_folder("BertForMaskedLM")
    with caplog.at_level(logging.WARNING, "fastbert"):
        model = fastbert.BertModel.from_pretrained(folder)
    assert "holds no pooler" in caplog.text and model.pooler.dense.weight.std() > 0


def test_old_names_and_buffers(hf_folder):
    hf, folder = hf_folder("BertForPreTraining")

    def age(tensors):
        rename(tensors, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma"))
        rename(tensors, lambda n: n.replace("LayerNorm.bias", "LayerNorm.beta"))
        tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["bert.embeddings.token_type_ids"] = torch.zeros(1, 24, dtype=torch.int64)

    edit(folder, age)
    assert_same(fastbert.BertForPreTraining.from_pretrained(folder), hf)


def test_tied_copies_may_be_there_or_be_the_only_ones(hf_folder):
    hf, folder = hf_folder("BertForMaskedLM")
    word, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"

    def both(tensors):
        tensors[decoder] = tensors[word].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    edit(folder, both)
    assert_same(fastbert.BertForMaskedLM.from_pretrained(folder), hf)
    edit(folder, lambda tensors: tensors.pop(word))
    assert_same(fastbert.BertForMaskedLM.from_pretrained(folder), hf)


def test_tied_copies_that_differ_are_an_error(hf_folder):
    _, folder = hf_folder("BertForMaskedLM")
    name = "cls.predictions.decoder.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(97, 32)}))
    with pytest.raises(ValueError, match="decoder.weight differs from .*tie_word_embeddings=False"):
        fastbert.BertForMaskedLM.from_pretrained(folder)


def test_untied_round_trip(hf_folder, tmp_path):
    hf, folder = hf_folder("BertForMaskedLM", {"tie_word_embeddings": False})
    ours = fastbert.BertForMaskedLM.from_pretrained(folder)
    assert_same(ours, hf)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(ours, transformers.BertForMaskedLM.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype(stored, hf_model, tmp_path):
    hf = hf_model("BertForMaskedLM").to(stored)
    hf.save_pretrained(tmp_path)
    ours = fastbert.BertForMaskedLM.from_pretrained(tmp_path)
    assert_same(ours, hf)
    wide = fastbert.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(wide, hf.double())
    wide.save_pretrained(tmp_path / "wide")
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float64"


# --- ours -> Hugging Face -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [checkpoint.DEFAULT_SHARD_BYTES, 20_000])
def test_transformers_reads_what_we_save(head, limit, tiny_config, tmp_path):
    labels = {0: "no", 1: "yes"}
    ours = getattr(fastbert, head)(tiny_config(id2label=labels)).eval()
    ours.save_pretrained(tmp_path, max_shard_size=limit)
    cls = getattr(transformers, head)
    hf, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(ours, hf)
    assert hf.config.architectures == [head] and hf.config.id2label == labels
    ids = torch.randint(1, 97, (2, 2, 5) if head == "BertForMultipleChoice" else (2, 5))
    for x, y in zip(ours(ids), hf(ids).to_tuple(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_saved_files_are_bitwise_transformers_own(head, hf_folder, tmp_path):
    _, folder = hf_folder(head)
    getattr(fastbert, head).from_pretrained(folder).save_pretrained(tmp_path / "ours")
    files = [path / "model.safetensors" for path in (tmp_path / "ours", folder)]
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert safe_open(files[0], "pt").metadata() == {"format": "pt"}
    configs = [json.loads((f.parent / "config.json").read_text()) for f in files]
    assert configs[0] == configs[1]


def test_a_second_save_replaces_the_first_whatever_its_form(tiny_config, tmp_path):
    models = [fastbert.BertModel(tiny_config()) for _ in range(3)]
    for model, limit in zip(models, (10**9, 20_000, 10**9), strict=True):
        model.save_pretrained(tmp_path, max_shard_size=limit)
        assert_same(fastbert.BertModel.from_pretrained(tmp_path), model)
        assert_same(model, transformers.BertModel.from_pretrained(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_save_that_fails_leaves_the_last_one(tiny_config, tmp_path, monkeypatch):
    kept = fastbert.BertModel(tiny_config())
    kept.save_pretrained(tmp_path)

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        fastbert.BertModel(tiny_config()).save_pretrained(tmp_path)
    assert_same(fastbert.BertModel.from_pretrained(tmp_path), kept)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_saves_over_the_folder_that_it_came_from(hf_folder):
    _, folder = hf_folder("BertModel")
    ours = fastbert.BertModel.from_pretrained(folder)
    with torch.no_grad():
        ours.pooler.dense.bias += 1
    ours.save_pretrained(folder)
    assert_same(fastbert.BertModel.from_pretrained(folder), ours)


def test_tokenizer_files_come_along(hf_folder, tmp_path):
    _, folder = hf_folder("BertModel")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    fastbert.BertModel.from_pretrained(folder).save_pretrained(tmp_path / "a/b")
    names = {p.name for p in (tmp_path / "a/b").iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt", "tokenizer.json"}


def test_loading_does_not_double_memory(tmp_path):
    """Private memory grows by the parameters once: the mapped file is the page cache's."""
    config = fastbert.BertConfig.preset("small", vocab_size=10_000)
    model = fastbert.BertModel(config)
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    code = f"""
import re, fastbert
fastbert.BertModel
def private(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = private()
model = fastbert.BertModel.from_pretrained({str(tmp_path)!r})
print((private() - before) * 1024)
"""
    root = Path(fastbert.__file__).parents[1]
    grown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 1.2 * size


# --- what is wrong ------------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_listed(hf_folder):
    _, folder = hf_folder("BertForSequenceClassification")

    def spoil(tensors):
        del tensors["bert.encoder.layer.1.output.dense.bias"]
        del tensors["classifier.bias"]  # half a head is not a new head
        tensors["bert.encoder.layer.7.output.dense.bias"] = torch.ones(32)
        tensors["nonsense"] = torch.ones(3)
        tensors["bert.pooler.dense.weight"] = torch.ones(32, 31)

    edit(folder, spoil)
    with pytest.raises(ValueError) as error:
        fastbert.BertForSequenceClassification.from_pretrained(folder)
    assert str(error.value).splitlines() == [
        f"{folder}/model.safetensors: does not fit BertForSequenceClassification:",
        "  missing: bert.encoder.layer.1.output.dense.bias (32,)",
        "  missing: classifier.bias (2,)",
        "  unexpected: bert.encoder.layer.7.output.dense.bias (32,)",
        "  unexpected: nonsense (3,)",
        "  wrong shape: bert.pooler.dense.weight is (32, 31), expected (32, 32)",
    ]


def test_another_number_of_labels_is_named(hf_folder):
    _, folder = hf_folder("BertForSequenceClassification")
    with pytest.raises(ValueError, match=r"classifier.weight is \(2, 32\), expected \(5, 32\)"):
        fastbert.BertForSequenceClassification.from_pretrained(folder, num_labels=5)


def test_one_parameter_under_two_names(hf_folder):
    _, folder = hf_folder("BertModel")
    name = "pooler.dense.bias"
    edit(folder, lambda tensors: tensors.update({"bert." + name: tensors[name].clone()}))
    with pytest.raises(ValueError, match="holds pooler.dense.bias twice"):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "pickle", "shard"])
def test_truncated(form, keep, hf_folder):
    kwargs = {"max_shard_size": "20KB"} if form == "shard" else {}
    _, folder = hf_folder("BertModel", **kwargs)
    if form == "pickle":
        as_pickle(folder)
    path = max((p for p in folder.iterdir() if p.suffix != ".json"), key=lambda p: p.name)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=path.name):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_not_weights_at_all(name, hf_folder):
    _, folder = hf_folder("BertModel")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=name):
        fastbert.BertModel.from_pretrained(folder)
    if name == "pytorch_model.bin":
        torch.save([torch.ones(3)], folder / name)
        with pytest.raises(ValueError, match="expected a dict of tensors"):
            fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"metadata": {}}', "not an index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside its folder: ../model"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing: gone.safetensors"),
    ],
)
def test_index_that_is_wrong(text, message, hf_folder):
    _, folder = hf_folder("BertModel")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_missing(kind, hf_folder, tmp_path):
    with pytest.raises(kind, match="no-such-thing: no such folder"):
        fastbert.BertModel.from_pretrained("no-such-thing")
    with pytest.raises(kind, match="holds no config.json"):
        fastbert.BertModel.from_pretrained(tmp_path)
    _, folder = hf_folder("BertModel")
    (folder / "model.safetensors").unlink()
    with pytest.raises(kind, match=r"model\.safetensors, .*pytorch_model\.bin"):
        fastbert.BertModel.from_pretrained(folder)


def test_another_architecture(tmp_path):
    transformers.RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: model_type: got 'roberta'.*accelerate"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_arguments(hf_folder, tmp_path):
    _, folder = hf_folder("BertModel")
    with pytest.raises(TypeError, match="hidden_sise"):
        fastbert.BertModel.from_pretrained(folder, hidden_sise=3)
    with pytest.raises(ValueError, match="max_shard_size: got 0"):
        fastbert.BertModel.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size=0)
