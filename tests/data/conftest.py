"""What tests of corpora share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.data import save_tokenizer

from ._oracle import bert_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's small uncased tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(bert_tokenizer(), folder)
    return folder
