"""What tests of pretraining share: a small real text."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fastbert.data import Corpus, prepare


@pytest.fixture(scope="session")
def documentation(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Python's documentation of its language: some 70 pages, a vocabulary of 2,000."""
    folder = tmp_path_factory.mktemp("documentation")
    pages = []
    for _, page in sorted(topics.items()):
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", page))
        pages.append("\n".join(paragraph for paragraph in paragraphs if paragraph))
    (folder / "text.txt").write_text("\n\n".join(pages))
    (folder / "units.txt").write_text("for example\nthe following\nspecial method\nargument list\n")
    prepare(
        folder / "text.txt",
        folder / "corpus",
        tokenizer="train:2000",
        units=folder / "units.txt",
        held_out=0.0,
        num_workers=1,
        progress=False,
    )
    return Corpus(folder / "corpus")


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    return tmp_path / "made"
