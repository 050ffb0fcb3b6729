"""BERT's WordPiece tokenizer: trained on text, or taken from a folder.

Only tokenizers that work as BERT's do are taken: a WordPiece model whose continuing pieces carry a
prefix (``##``), with the five special tokens. What masks whole words stands on that prefix.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer

from fastbert.atomic import replacing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Their order is that of their ids, from 0, in a tokenizer that is trained here."""

_TOKENIZER, _CONFIG, _VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
FILES = (_VOCABULARY, _CONFIG, "special_tokens_map.json", _TOKENIZER)
"""What a tokenizer's folder may hold."""

_LARGEST_ALPHABET = 1000  # as the library ``tokenizers`` has it
_SMALLEST = 32  # tokens: fewer leave the alphabet no room
_FEWEST = 2  # how often a pair of pieces has to occur to be joined


class SpecialIds(NamedTuple):
    """The ids of the special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


# --- training ---------------------------------------------------------------------------------


def train_tokenizer(
    documents: Iterable[Sequence[str]], vocab_size: int, *, lowercase: bool = True
) -> Tokenizer:
    """A WordPiece tokenizer of at most ``vocab_size`` tokens, learnt from sentences.

    documents: each a list of sentences; gone through twice, so no iterator will do.
    lowercase: lower-case and strip accents, as BERT's uncased models do.

    Ids 0 to 4 are [PAD] [UNK] [CLS] [SEP] [MASK]; then the alphabet (the most frequent characters
    that take up at most half of the vocabulary), its continuing forms (``##a``), and the pieces
    that training joins, in that order: pairs by their count, as byte-pair encoding does (that is
    how ``tokenizers`` trains WordPiece). The same documents give the same tokenizer.

    Raises ValueError where the documents hold no text, or the vocabulary has no room for them.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size: got {vocab_size}, expected {_SMALLEST} or more")
    if iter(documents) is documents:
        raise ValueError("documents: got an iterator, expected what can be gone through twice")
    tokenizer = make_tokenizer({}, lowercase)
    room = (vocab_size - len(SPECIAL_TOKENS)) // 4
    alphabet = _alphabet(documents, tokenizer, min(room, _LARGEST_ALPHABET))
    if not alphabet:
        raise ValueError("documents: hold no text to train a tokenizer on")
    # Left to itself the trainer numbers ``##a``, ``##b``, … in the order of a hash table, another
    # one every time, and ids break ties between pairs. As special tokens they come in ours.
    continuing = [f"##{c}" for c in alphabet if _may_continue(c, tokenizer)]
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_FEWEST,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),  # the initial one, and no other character
        continuing_subword_prefix="##",
        show_progress=False,
    )
    sentences = (sentence for document in documents for sentence in document)
    tokenizer.train_from_iterator(sentences, trainer)
    return make_tokenizer(tokenizer.get_vocab(), lowercase)


def make_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer with this vocabulary (token -> id); an empty one is to be trained."""
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if vocabulary:
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        ends = [(token, vocabulary[token]) for token in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _alphabet(documents: Iterable[Sequence[str]], tokenizer: Tokenizer, largest: int) -> list[str]:
    """The most frequent characters of the normalised text, sorted by code point."""
    raw: Counter[str] = Counter()
    for document in documents:
        raw.update("".join(document))
    normalised: Counter[str] = Counter()
    for character, count in raw.items():
        for part in tokenizer.normalizer.normalize_str(character).replace(" ", ""):
            normalised[part] += count
    return sorted(sorted(normalised, key=lambda c: (-normalised[c], c))[:largest])


def _may_continue(character: str, tokenizer: Tokenizer) -> bool:
    """Whether it can stand inside a word: punctuation and Chinese characters are words alone."""
    text = tokenizer.normalizer.normalize_str("a" + character)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


# --- folders ----------------------------------------------------------------------------------


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the files from which transformers' AutoTokenizer and fastbert.runtime load it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS, strict=True))
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": json.loads(tokenizer.to_str())["normalizer"]["lowercase"],
        "model_max_length": 512,
        **{f"{name}_token": token for name, token in names.items()},
    }
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    texts = {
        _VOCABULARY: "".join(f"{token}\n" for token, _ in tokens),
        _CONFIG: json.dumps(config, indent=1) + "\n",
        _TOKENIZER: tokenizer.to_str(pretty=True) + "\n",
    }
    with replacing(*(folder / name for name in texts)) as paths:
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer in ``source`` into ``folder``, as it is; a vocab.txt alone is completed."""
    tokenizer = load_tokenizer(source)
    if not (source / _TOKENIZER).is_file():
        save_tokenizer(tokenizer, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in FILES if (source / name).is_file()]
    with replacing(*(folder / name for name in names)) as paths:
        for path, name in zip(paths, names, strict=True):
            shutil.copyfile(source / name, path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, which neither cuts nor pads.

    Its tokenizer.json counts, or else vocab.txt with do_lower_case of tokenizer_config.json.
    Raises FileNotFoundError where there is none of these, ValueError for one that is not BERT's.
    """
    folder = Path(folder)
    if (folder / _TOKENIZER).is_file():
        tokenizer = _from_json(folder / _TOKENIZER)
    elif (folder / _VOCABULARY).is_file():
        tokenizer = _from_vocabulary(folder)
    else:
        raise FileNotFoundError(
            f"tokenizer: {folder} holds no {_TOKENIZER} or {_VOCABULARY}, expected a Hugging Face "
            "folder"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_ids(tokenizer)
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: is not a tokenizer: {error}") from None
    kind = json.loads(path.read_bytes())["model"].get("type")
    if kind != "WordPiece":
        raise ValueError(f"{path}: got a tokenizer of the type {kind}, expected WordPiece")
    return tokenizer


def _from_vocabulary(folder: Path) -> Tokenizer:
    try:
        tokens = (folder / _VOCABULARY).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / _VOCABULARY}: is not UTF-8: {error}") from None
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(tokens) if token}
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"{folder / _VOCABULARY}: lacks {', '.join(missing)}")
    config: dict[str, Any] = {}
    if (folder / _CONFIG).is_file():
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    return make_tokenizer(vocabulary, config.get("do_lower_case", True))


def fingerprint(folder: Path) -> str:
    """SHA-256 of the tokenizer.json in ``folder``."""
    return hashlib.sha256((folder / _TOKENIZER).read_bytes()).hexdigest()


# --- what a vocabulary says -------------------------------------------------------------------


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of BERT's special tokens. Raises ValueError that names those it lacks."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"tokenizer: lacks {', '.join(missing)}")
    return SpecialIds(*(vocabulary[token] for token in SPECIAL_TOKENS))


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: whether a token begins a word, that is, lacks the prefix of continuing pieces."""
    prefix = tokenizer.model.continuing_subword_prefix
    vocabulary = tokenizer.get_vocab()
    starts = np.ones(max(vocabulary.values()) + 1, bool)
    for token, i in vocabulary.items():
        starts[i] = not token.startswith(prefix)
    return starts


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size < 1 << 16 else np.uint32


def works_piecewise(tokenizer: Tokenizer) -> bool:
    """Whether a text is tokenised as its parts between blanks are, one by one.

    So it is with BERT's own normaliser and pre-tokenizer: both look at single characters, and a
    blank always ends a word. Added tokens other than the special ones may hold blanks.
    """
    facts = json.loads(tokenizer.to_str())
    parts = [(facts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer")]
    return parts == ["BertNormalizer", "BertPreTokenizer"] and all(
        token["special"] for token in facts["added_tokens"]
    )
