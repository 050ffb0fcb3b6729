"""Corpus: what was prepared comes back, and damage is told from what is whole."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastbert.data import Corpus, prepare
from fastbert.data.corpus import read_facts
from fastbert.data.workers import is_held_out

from ._oracle import bert_tokenizer, encode_documents, find_units

TOKENIZER = bert_tokenizer()
WORDS = (
    "The",
    "cats",
    "sat",
    "New",
    "York",
    "City",
    "unable",
    "É",
    "qq",
    "[SEP]",
    "I",
    "猫",
    "\u200b",
)
SENTENCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
DOCUMENTS = st.lists(st.lists(SENTENCE, min_size=1, max_size=5), min_size=1, max_size=12)
PHRASES = ["New York", "new york city", "cats sat", "unable"]


def write_text(path: Path, documents: list[list[str]]) -> Path:
    """One sentence a line, a blank line between documents."""
    text = "\n\n".join("\n".join(document) for document in documents)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 40), st.sampled_from([0.0, 0.3]), st.booleans())
def test_round_trip(
    tokenizer_folder: Path, documents: list[list[str]], shard_tokens: int, held_out: float,
    with_units: bool,
) -> None:  # fmt: skip
    documents = [["The cat"], *documents]  # which is never held out, so that something is left
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_text(folder / "text.txt", documents)
        units = folder / "units.tsv"
        units.write_text("\n".join(PHRASES), encoding="utf-8")
        report = prepare(
            text, folder / "corpus", tokenizer=tokenizer_folder, held_out=held_out, num_workers=1,
            sentences="lines", shard_tokens=shard_tokens, progress=False,
            units=units if with_units else None,
        )  # fmt: skip
        for split, wanted in (("train", False), ("valid", True)):
            corpus = Corpus(folder / "corpus", split)
            check(corpus, [d for d in documents if is_held_out(d, held_out) is wanted], with_units)
            assert corpus.num_tokens == report.tokens[split]
            assert corpus.num_sentences == report.sentences[split]
            assert corpus.num_documents == report.documents[split]


def check(corpus: Corpus, documents: list[list[str]], with_units: bool) -> None:
    """Everything that a Corpus tells, against the same from lists."""
    expected = encode_documents(documents, TOKENIZER)
    sentences = [sentence for document in expected for sentence in document]
    tokens = [token for sentence in sentences for token in sentence]
    ids = [token.id for token in tokens]
    assert corpus.num_documents == len(expected)
    assert corpus.num_sentences == len(sentences)
    assert corpus.num_tokens == len(tokens)
    found = [[s.tolist() for s in corpus.document(i)] for i in range(len(expected))]
    assert found == [[[t.id for t in s] for s in document] for document in expected]
    assert [corpus.sentence(i).tolist() for i in range(len(sentences))] == [
        [token.id for token in sentence] for sentence in sentences
    ]
    assert corpus.sentence_lengths().tolist() == [len(s) for s in sentences]
    assert corpus.document_lengths().tolist() == [sum(map(len, d)) for d in expected]
    first_sentence = first_token = 0
    for i, document in enumerate(expected):
        assert corpus.document_span(i) == (first_sentence, first_sentence + len(document))
        first_sentence += len(document)
    known = [TOKENIZER.encode(p, add_special_tokens=False).ids for p in PHRASES]
    spans: list[list[int]] = []
    for i, sentence in enumerate(sentences):
        assert corpus.sentence_span(i) == (first_token, first_token + len(sentence))
        if with_units:
            units = find_units([t.id for t in sentence], known, TOKENIZER)
            spans += [[first_token + a, first_token + b] for a, b in units]
        first_token += len(sentence)
    assert corpus.has_units is with_units
    last = len(tokens)
    for first in {0, min(1, last), last // 2, last}:
        for end in {first, (first + last) // 2, last}:
            assert corpus.tokens(first, end).tolist() == ids[first:end]
            assert corpus.tokens(first, end).dtype == np.uint16
            capitals = [token.capitalised for token in tokens[first:end]]
            assert corpus.capitalised(first, end).tolist() == capitals
            inside = [[a - first, b - first] for a, b in spans if first <= a and b <= end]
            assert corpus.units(first, end).tolist() == inside
    counts = np.bincount(ids, minlength=corpus.vocab_size)
    assert corpus.token_counts.tolist() == counts.tolist()
    corpus.verify()


@pytest.fixture(scope="module")
def made(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several shards in both splits."""
    folder = tmp_path_factory.mktemp("made")
    documents = [[f"The cats sat . {'a ' * (i % 7)}", "New York"] for i in range(60)]
    text = write_text(folder / "text.txt", [[*d, str(i)] for i, d in enumerate(documents)])
    out = folder / "corpus"
    prepare(text, out, tokenizer=tokenizer_folder, held_out=0.3, sentences="lines",
            shard_tokens=100, num_workers=1, progress=False)  # fmt: skip
    return out


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def test_views_of_the_files(made: Path) -> None:
    corpus = Corpus(made)
    assert len(list((made / "train").iterdir())) > 2
    tokens = corpus.sentence(0)
    assert tokens.base is not None and not tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    whole = corpus.tokens(0, corpus.num_tokens)
    assert whole[: len(tokens)].tolist() == tokens.tolist()


def test_the_format(made: Path) -> None:
    """A shard is an ordinary safetensors file with the arrays that the docstring lists."""
    record = read_facts(made)["splits"]["train"][1]
    arrays = load_file(made / record["file"])
    assert {name: (x.dtype.name, x.shape) for name, x in arrays.items()} == {
        "tokens": ("uint16", (record["tokens"],)),
        "sentence_offsets": ("int64", (record["sentences"] + 1,)),
        "document_offsets": ("int64", (record["documents"] + 1,)),
        "capitalised": ("uint8", (-(-record["tokens"] // 8),)),
    }
    assert arrays["sentence_offsets"][-1] == record["tokens"]
    assert arrays["document_offsets"][-1] == record["sentences"]


def test_vocabulary(made: Path) -> None:
    corpus = Corpus(made)
    assert corpus.special_ids == (0, 1, 2, 3, 4) and corpus.special_ids.mask == 4
    assert corpus.vocab_size == len(corpus.word_starts) == TOKENIZER.get_vocab_size()
    assert corpus.tokenizer.decode(corpus.sentence(1)) == "new york"
    assert not corpus.word_starts[corpus.tokenizer.token_to_id("##s")]
    assert corpus.token_counts.sum() == corpus.num_tokens


def _checksum(corpus: Corpus) -> tuple[int, bool]:
    assert corpus.token_counts.sum() == corpus.num_tokens
    tokens = corpus.tokens(0, corpus.num_tokens)
    return int(tokens.astype(np.int64).sum()), bool(corpus.capitalised(0, 1)[0])


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_of_a_loader_share_it(made: Path, method: str) -> None:
    corpus = Corpus(made)
    expected = _checksum(corpus)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_checksum, (corpus,)) == expected
    assert pickle.loads(pickle.dumps(corpus)).split == "train"
    assert len(pickle.dumps(corpus)) < 1000  # the folder's name, not its content


def test_what_is_not_there(made: Path, tmp_path: Path) -> None:
    corpus = Corpus(made)
    for call in (
        lambda: corpus.document(corpus.num_documents),
        lambda: corpus.document_span(-1),
        lambda: corpus.sentence(corpus.num_sentences),
        lambda: corpus.tokens(0, corpus.num_tokens + 1),
        lambda: corpus.tokens(2, 1),
        lambda: corpus.capitalised(-1, 1),
    ):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="split: got 'test', expected one of train, valid"):
        Corpus(made, "test")
    with pytest.raises(FileNotFoundError, match=r"corpus\.json: no such file"):
        Corpus(tmp_path)


def edit_facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / "corpus.json").read_text())
        change(facts)
        (folder / "corpus.json").write_text(json.dumps(facts))

    return damage


SHARD = "train/00001.safetensors"
# what is done to a corpus -> the error on opening it
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda f: (f / SHARD).unlink(), rf"{SHARD}: this shard of the corpus is missing"
    ),
    "cut shard": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
        rf"{SHARD}: this shard has \d+ bytes, expected \d+: it was cut short",
    ),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), rf"{SHARD}: this shard has 0 bytes"),
    "header": (
        lambda f: (f / SHARD).write_bytes(bytes((f / SHARD).stat().st_size)),
        rf"{SHARD}: this shard is corrupt: its header",
    ),
    "other names": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes().replace(b'"tok', b'"Tok')),
        rf"{SHARD}: this shard is corrupt: it holds",
    ),
    "cut facts": (
        lambda f: (f / "corpus.json").write_text((f / "corpus.json").read_text()[:-9]),
        r"corpus\.json: not JSON",
    ),
    "other JSON": (lambda f: (f / "corpus.json").write_text("[1]"), "expected an object"),
    "changed facts": (
        edit_facts(lambda facts: facts["splits"]["train"].pop()), "was changed or damaged"
    ),
    "other version": (
        edit_facts(lambda facts: facts.update(format_version=2)), "format_version is 2, expected 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_on_opening(case: str, corpus: Path) -> None:
    damage, message = DAMAGE[case]
    damage(corpus)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Corpus(corpus)
    if "safetensors" in message:
        Corpus(corpus, "valid").verify()  # the other split is whole


def test_a_changed_byte_is_found_by_verify(corpus: Path) -> None:
    data = bytearray((corpus / SHARD).read_bytes())
    data[-20] ^= 4
    (corpus / SHARD).write_bytes(data)
    opened = Corpus(corpus)
    with pytest.raises(ValueError, match=rf"{SHARD}: this shard is corrupt: its CRC-32"):
        opened.verify()


def test_another_tokenizer_is_found(corpus: Path) -> None:
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"dot"').replace('"mat"', '"cat"'))
    opened = Corpus(corpus)
    with pytest.raises(ValueError, match="is not the tokenizer that the corpus was made with"):
        opened.verify()


def test_a_large_vocabulary_has_wide_tokens(tmp_path: Path) -> None:
    words = ["the", *(f"w{i}" for i in range(65_600))]
    from fastbert.data import save_tokenizer

    save_tokenizer(bert_tokenizer(words), tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("The w65599 the w12\n")
    prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer=tmp_path / "tokenizer", held_out=0,
            num_workers=1, progress=False)  # fmt: skip
    corpus = Corpus(tmp_path / "out")
    assert corpus.sentence(0).dtype == np.uint32
    assert corpus.sentence(0).tolist() == [5, 6 + 65_599, 5, 18]
