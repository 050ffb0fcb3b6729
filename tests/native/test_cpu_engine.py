"""The inference engine of fastbert._cpu against its equations in fp64, on every ISA."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from fastbert import _native

from . import _engine_oracle
from ._engine_oracle import (
    RAGGED,
    SPECS,
    Request,
    Spec,
    check,
    make_engine,
    make_request,
    make_tensors,
    run,
    widened,
)

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)


@pytest.fixture(params=_native.cpu().available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every ISA that this machine has, forced in turn."""
    before = _native.cpu().isa()
    _native.cpu().set_isa(request.param)
    yield request.param
    _native.cpu().set_isa(before)


@pytest.mark.parametrize("name", SPECS)
def test_parity(isa: str, name: str) -> None:
    spec = SPECS[name]
    tensors = make_tensors(spec)
    engine = make_engine(spec, tensors)
    assert (engine.isa, engine.hidden_size, engine.num_layers) == (
        isa, spec.hidden, len(spec.layers),
    )  # fmt: skip
    request = make_request(spec, RAGGED)
    check(spec, tensors, request, run(engine, request), isa)


@pytest.mark.parametrize("lengths", [(1,), (300,), (0, 1, 0), (1, 1, 1)], ids=str)
def test_shortest_and_longest(isa: str, lengths: tuple[int, ...]) -> None:
    spec, tensors = SPECS["plain"], make_tensors(SPECS["plain"])
    request = make_request(spec, lengths)
    check(spec, tensors, request, run(make_engine(spec, tensors), request, 2), isa)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_tokens(isa: str, lengths: tuple[int, ...]) -> None:
    spec = SPECS["plain"]
    assert run(make_engine(spec), make_request(spec, lengths)).shape == (3, 0, 64)


def test_a_long_sequence(isa: str) -> None:
    """More keys than a block of scores has, and more queries than a piece."""
    spec = Spec(positions=700, widths=((1, 64),), layers=(0,))
    tensors = make_tensors(spec)
    request = make_request(spec, (3, 700))
    check(spec, tensors, request, run(make_engine(spec, tensors), request, 2), isa)


def test_outliers(isa: str) -> None:
    """One channel a hundred times the rest takes the scale of its rows for itself."""
    spec, tensors = SPECS["plain"], make_tensors(SPECS["plain"])
    tensors["embeddings.norm.weight"][7] = 100
    tensors["layers.0.attention_norm.weight"][11] = 100
    request = make_request(spec, RAGGED)
    check(spec, tensors, request, run(make_engine(spec, tensors), request), isa)


def test_a_row_of_zeros(isa: str) -> None:
    spec, tensors = SPECS["plain"], make_tensors(SPECS["plain"])
    tensors["embeddings.norm.weight"][:] = tensors["embeddings.norm.bias"][:] = 0
    request = make_request(spec, (4,))
    states = run(make_engine(spec, tensors), request)
    assert not states[0].any()
    check(spec, tensors, request, states, isa)


@pytest.mark.parametrize("name", ["plain", "albert", "mixed"])
def test_neither_threads_nor_the_cut_change_a_bit(isa: str, name: str) -> None:
    """Blocks of rows with few threads, columns with many; one token, and more than enough."""
    spec = SPECS[name]
    engine = make_engine(spec)
    for lengths in ((1,), (30,), (40, 0, 80), (300, 9, 191)):
        request = make_request(spec, lengths)
        alone = run(engine, request, 1)
        for threads in (2, 3, 7):
            np.testing.assert_array_equal(run(engine, request, threads), alone)


def part(request: Request, start: int, end: int) -> Request:
    types = None if request.types is None else request.types[start:end]
    offsets = np.array([0, end - start], np.int32)
    return Request(request.ids[start:end], request.positions[start:end], types, offsets)


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_neighbours_change_no_bit(isa: str, name: str) -> None:
    spec, lengths = SPECS[name], (5, 64, 0, 290, 1, 120)
    engine, request = make_engine(spec), make_request(spec, lengths)
    together = run(engine, request, 2)
    for start, end in pairwise(request.offsets.tolist()):
        np.testing.assert_array_equal(
            run(engine, part(request, start, end), 2), together[:, start:end]
        )


def test_a_batch_of_many_tokens_is_run_in_parts() -> None:
    spec = Spec(hidden=32, head_dim=16, widths=((1, 32),), layers=(0,))
    engine, request = make_engine(spec), make_request(spec, (100,) * 170 + (37,))
    together = run(engine, request, 2)
    for start, end in [(0, 100), (8100, 8200), (8500, 8600), (17000, 17037)]:
        np.testing.assert_array_equal(
            run(engine, part(request, start, end)), together[:, start:end]
        )


def test_word_rows_take_the_place_of_ids() -> None:
    spec, tensors = SPECS["mixed"], make_tensors(SPECS["mixed"])
    engine, request = make_engine(spec, tensors), make_request(spec, RAGGED)
    words = widened(tensors["embeddings.word"])[request.ids]
    np.testing.assert_array_equal(run(engine, request, words=words), run(engine, request))


def test_without_token_types_each_token_has_the_first() -> None:
    spec = SPECS["plain"]
    engine, request = make_engine(spec), make_request(spec, RAGGED)
    zeros = request._replace(types=np.zeros_like(request.ids))
    np.testing.assert_array_equal(run(engine, request._replace(types=None)), run(engine, zeros))


def test_tables_are_read_in_place_and_weights_are_not() -> None:
    spec, tensors = SPECS["plain"], make_tensors(SPECS["plain"])
    engine, request = make_engine(spec, tensors), make_request(spec, RAGGED)
    before = run(engine, request)
    word = tensors["embeddings.word"]
    kept = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not name.startswith("embeddings."):
            tensor.fill(0)
    np.testing.assert_array_equal(run(engine, request), before)
    del tensor
    tensors.clear()
    tables = {"embeddings.word", "embeddings.position", "embeddings.token_type"}
    assert {name for name, tensor in kept.items() if tensor() is not None} == tables
    word += 1
    assert not np.array_equal(run(engine, request), before)


def test_saved_memory_of_int8() -> None:
    spec = Spec(hidden=256, head_dim=64, widths=((4, 1024),), layers=(0,))
    weights = sum(t.size for n, t in make_tensors(spec).items() if "layers" in n)
    # AVX2 without VNNI keeps room for 16-bit weights of a tenth of all pairs (linear_pairs.h).
    most = 1.6 if _native.cpu().isa() == "avx2" else 1.1
    assert weights <= make_engine(spec).packed_bytes <= most * weights


# ------------------------------------------------------------------------------ threads, processes


def test_callers_in_several_threads() -> None:
    spec = SPECS["plain"]
    engine = make_engine(spec)
    requests = [make_request(spec, lengths) for lengths in [(3,), RAGGED, (200, 100), (1, 60)]]
    expected = [run(engine, request, 1) for request in requests]
    wrong: list[int] = []

    def call(caller: int) -> None:
        for i in range(25):
            which = (caller + i) % len(requests)
            if not np.array_equal(run(engine, requests[which], 2), expected[which]):
                wrong.append(which)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc/self/statm")
def test_memory_does_not_grow() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    spec = SPECS["plain"]
    engine = make_engine(spec)
    requests = [make_request(spec, lengths) for lengths in [(300, 200), (3,), RAGGED, (290,)]]
    for i in range(240):
        run(engine, requests[i % 4], 1 + i % 3)
        if i == 39:
            before = resident()
    assert resident() - before < 1 << 20


FORK = """
import os, runpy, signal, sys, numpy as np
signal.alarm(60)
test = runpy.run_path(sys.argv[1])
assert "torch" not in sys.modules
spec = test["SPECS"]["plain"]
engine, request = test["make_engine"](spec), test["make_request"](spec, (100, 30, 170))
expected = test["run"](engine, request, 2)
child = os.fork()
for _ in range(20):
    assert np.array_equal(test["run"](engine, request, 2), expected)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_fork_after_use() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORK, _engine_oracle.__file__],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
