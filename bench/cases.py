"""Every case that ``bench/run.py`` times. Shapes are BERT-base's: H 768, I 3072, 12 heads."""

from __future__ import annotations

from collections.abc import Iterator

import cases_attention
import cases_products
import cases_rows
from problem import Case


def cases(where: str) -> Iterator[Case]:
    """Every case that suits the device: a CPU's few thousand tokens, a GPU's tens of thousands."""
    tokens = 65536 if where == "cuda" else 2048
    yield from cases_products.cases(where, tokens)
    yield from cases_attention.cases(where, tokens)
    yield from cases_rows.cases(where, tokens)
