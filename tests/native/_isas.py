"""The instruction sets that a C++ kernel is compiled for, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastbert.ops import _cpp

# Other instruction sets share the kernels of these.
ISAS = [name for name in ("avx512", "avx2", "portable") if name in _cpp.available_isas()]


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    former = _cpp.isa()
    _cpp.set_isa(request.param)
    yield request.param
    _cpp.set_isa(former)
