"""Training is deterministic; folders load here, in transformers and in the runtime alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.data.tokenizer import (
    SPECIAL_TOKENS,
    copy_tokenizer,
    fingerprint,
    special_ids,
    word_starts,
)
from fastbert.runtime.text import TextReader

from ._oracle import WORDS, bert_tokenizer

DOCUMENTS = [
    ["The cat sat on the mat, and the dog sat on the cat's mat.", "Cafés are unaffordable."],
    ["ØÆ ñandú 猫猫 the unaffordable mats (sat) — the Café's 1990s dogs!"] * 3,
]
TEXTS = ("The Café's unaffordable mats", "猫 sat, qqq ØÆ [SEP] 1990", "")

_TRAIN = f"""
from fastbert.data import train_tokenizer
print(train_tokenizer({DOCUMENTS!r}, 150).to_str())
"""


def test_training_is_deterministic() -> None:
    """Hash tables of other processes are in other orders, and threads finish in others."""
    found = set()
    for seed, parallel in (("1", "true"), ("2", "false"), ("3", "true")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        found.add(subprocess.check_output([sys.executable, "-c", _TRAIN], env=environment))
    assert len(found) == 1
    assert json.loads(found.pop()) == json.loads(train_tokenizer(DOCUMENTS, 150).to_str())


def test_what_training_gives() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 150)
    assert tokenizer.get_vocab_size() <= 150
    assert special_ids(tokenizer) == (0, 1, 2, 3, 4)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert tokens[:5] == list(SPECIAL_TOKENS)
    letters = [token for token in tokens[5:] if len(token) == 1]
    assert letters == sorted(letters) == tokens[5 : 5 + len(letters)]
    assert {"猫", "n", "ø", "(", "—"} <= set(letters) and "N" not in letters and "ñ" not in letters
    assert "##n" in vocabulary  # but a character that is a word by itself never continues one
    assert not {"##猫", "##(", "##—", "##'"} & vocabulary.keys()
    assert tokenizer.encode("Cafés").tokens[1:-1] == tokenizer.encode("CAFES").tokens[1:-1]
    assert {"the", "mat", "unaffordable"} <= vocabulary.keys()
    cased = train_tokenizer(DOCUMENTS, 150, lowercase=False).get_vocab()
    assert {"T", "C", "é", "##é"} <= cased.keys()


def test_a_small_vocabulary_keeps_the_frequent_letters() -> None:
    """A quarter of the 27 tokens beside the special ones, rounded down: 6 letters."""
    tokenizer = train_tokenizer([["aaaa bbb ggg c ff"], ["dd eeee f"]], 32)
    assert tokenizer.get_vocab_size() <= 32
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert sorted(letters) == ["a", "b", "d", "e", "f", "g"]
    assert tokenizer.encode("bad cab").tokens == ["[CLS]", "b", "##a", "##d", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_a_folder_loads_everywhere_alike(lowercase: bool, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 150, lowercase=lowercase)
    save_tokenizer(tokenizer, tmp_path / "a")
    ours = load_tokenizer(tmp_path / "a")
    assert ours.to_str() == tokenizer.to_str()
    hugging_face = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert hugging_face.mask_token_id == 4 and len(hugging_face) == ours.get_vocab_size()
    runtime = TextReader((tmp_path / "a" / "tokenizer.json").read_bytes(), 64)
    read = runtime.read([*TEXTS, ("the cat", "sat")])
    for text, ids in zip(TEXTS, read.ids, strict=False):
        expected = ours.encode(text).ids
        assert ids.tolist() == expected == hugging_face(text)["input_ids"]
    pair = hugging_face("the cat", "sat")
    assert read.ids[-1].tolist() == pair["input_ids"]
    assert (
        read.types[-1].tolist() == pair["token_type_ids"] == ours.encode("the cat", "sat").type_ids
    )

    # What old checkpoints have: vocab.txt alone. It is completed on its way.
    (tmp_path / "old").mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "old" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert load_tokenizer(tmp_path / "old").to_str() == ours.to_str()
    copy_tokenizer(tmp_path / "old", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == fingerprint(tmp_path / "a")


def test_a_copy_is_the_same_files(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    save_tokenizer(tokenizer, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert all((tmp_path / "a" / name).read_bytes() == data for name, data in files.items())
    loaded = load_tokenizer(tmp_path / "b")  # neither cuts nor pads
    assert len(loaded.encode("the cat sat on the mat and the dog").ids) == 11
    assert len(loaded.encode("the cat").ids) == 4


def test_word_starts() -> None:
    starts = word_starts(bert_tokenizer())
    tokens = list(dict.fromkeys((*SPECIAL_TOKENS, *WORDS)))
    assert starts.tolist() == [not token.startswith("##") for token in tokens]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 31, expected 32 or more"):
        train_tokenizer(DOCUMENTS, 31)
    with pytest.raises(ValueError, match="documents: hold no text"):
        train_tokenizer([[], [" "]], 100)
    with pytest.raises(ValueError, match="documents: got an iterator"):
        train_tokenizer(iter(DOCUMENTS), 100)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json or vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nthe\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: lacks \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(ValueError, match="got a tokenizer of the type BPE, expected WordPiece"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer: lacks \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
