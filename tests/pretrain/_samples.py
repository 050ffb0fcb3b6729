"""Corpora and examples made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data import Corpus, save_tokenizer
from fastbert.data import prepare as prepare_corpus
from fastbert.data.tokenizer import SPECIAL_TOKENS, SpecialIds, make_tokenizer
from fastbert.pretrain import Example, Masking, Vocabulary, parse
from fastbert.pretrain.examples import NONE

Array = np.ndarray

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
PAD, UNK, CLS, SEP, MASK = SPECIAL


def vocabulary(size: int, *, pieces_from: int | None = None, counts: bool = False) -> Vocabulary:
    """Special ids 0 .. 4; ids from ``pieces_from`` on continue a word. Token i is counted i^2
    times."""
    starts = np.arange(size) < (size if pieces_from is None else pieces_from)
    return Vocabulary(SPECIAL, starts, np.arange(size) ** 2 if counts else None)


def example(
    ids: Sequence[int] | Array,
    *,
    sentence: Sequence[int] | Array | None = None,
    starts: Sequence[int] | Array | None = None,
    **columns: object,
) -> Example:
    """Ids as they are, special ones among them; one sentence unless told; every token a word."""
    ids = np.array(ids, np.int64)
    size = len(ids)
    special = np.isin(ids, SPECIAL) & (ids != UNK)
    number = np.zeros(size, np.int64) if sentence is None else np.array(sentence)
    return Example(
        ids=ids,
        token_type_ids=np.zeros(size, np.int64),
        sentence=np.where(special, NONE, number),
        word_start=np.ones(size, bool) if starts is None else np.array(starts, bool),
        group=np.full(size, NONE),
        **columns,  # type: ignore[arg-type]
    )


def prepare(
    text: str,
    x: Example,
    seed: int = 0,
    *,
    masking: Masking | None = None,
    **options: Mapping[str, Any],
) -> Example:
    """What the objectives make of an example."""
    rng, words = np.random.default_rng(seed), vocabulary(30)
    for objective in parse(text, masking, options):
        x = objective.prepare(x, words, rng)
    return x


def asked(x: Example, objective: str) -> dict[str, list[int]]:
    """The targets of an objective."""
    return {name: array.tolist() for name, array in x.targets[objective].items()}


def write_corpus(
    folder: Path,
    documents: Sequence[Sequence[str]],
    *,
    units: Sequence[str] = (),
    held_out: float = 0.0,
) -> Corpus:
    """A corpus of sentences of words between blanks, each a token: id 5 is the word that is first
    in the order of the alphabet. A word may be ``a##b``: the tokens ``a`` and ``##b``."""
    words = {word for document in documents for sentence in document for word in sentence.split()}
    pieces = {piece for word in words for piece in _pieces(word)}
    table = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pieces)))}
    folder.mkdir()
    save_tokenizer(make_tokenizer(table, lowercase=True), folder / "tokenizer")
    lines = "\n\n".join("\n".join(sentences) for sentences in documents).replace("##", "")
    (folder / "text.txt").write_text(lines + "\n")
    if units:
        (folder / "units.txt").write_text("\n".join(units) + "\n")
    prepare_corpus(
        folder / "text.txt",
        folder / "corpus",
        tokenizer=folder / "tokenizer",
        units=folder / "units.txt" if units else None,
        sentences="lines",
        held_out=held_out,
        num_workers=1,
        progress=False,
    )
    return Corpus(folder / "corpus")


def _pieces(word: str) -> list[str]:
    first, *rest = word.lower().split("##")
    return [first, *(f"##{piece}" for piece in rest)]
