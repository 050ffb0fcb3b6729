"""Fixtures of the Hugging Face tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread(one_thread: None) -> None:
    """Most models here are tiny."""
