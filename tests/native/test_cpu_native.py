"""What every C++ kernel has in common: checked inputs, the ISA, threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from fastbert import _native

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

from fastbert.ops import _cpp

BIG = 2**62


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)


def embed_inputs(rows: int, cols: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    ids = [torch.randint(bound, (rows,), generator=generator) for bound in (200, 70, 2)]
    sizes = {"word": (211, cols), "position": (70, cols), "token_type": (2, cols)}
    sizes |= {"weight": (cols,), "bias": (cols,)}
    return ids, {k: torch.randn(size, generator=generator) for k, size in sizes.items()}


# ----------------------------------------------------------------------------------------- inputs


def test_inputs_need_not_be_contiguous() -> None:
    x, weight = torch.randn(64, 130).t(), torch.randn(128)[::2]
    assert torch.equal(
        _cpp.bias_gelu_fwd(x, weight, False),
        _cpp.bias_gelu_fwd(x.contiguous(), weight.contiguous(), False),
    )
    with pytest.raises(ValueError, match="logits: got strides"):
        _cpp.cross_entropy_rows(x, None, torch.zeros(130, dtype=torch.int64), -100, None)


def test_vectors_of_two_dtypes_meet_in_the_wider() -> None:
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    x_bias, weight = torch.randn(96).bfloat16().float(), torch.randn(96)
    arguments = (weight, weight, 1e-12, 0.0, None, 0, False)
    assert torch.equal(
        _cpp.add_layer_norm_fwd(x, None, x_bias.bfloat16(), *arguments)[0],
        _cpp.add_layer_norm_fwd(x, None, x_bias, *arguments)[0],
    )
    with pytest.raises(ValueError, match=r"vectors .* got torch.bfloat16"):
        _cpp.bias_gelu_fwd(x.float(), weight.bfloat16(), False)
    with pytest.raises(ValueError, match=r"got torch.float16"):
        _cpp.bias_gelu_fwd(x.half(), None, False)


@pytest.mark.parametrize("bad", [-1, 211, BIG, -BIG])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_embedding_ids_out_of_range(bad: int, which: int) -> None:
    ids, inputs = embed_inputs(9, 64)
    name = ("input_ids", "position_ids", "token_type_ids")[which]
    bound = (211, 70, 2)[which]
    ids[which][7] = bad
    message = rf"{name}\[7\] = {bad} is outside \[0, {bound}\)"
    with pytest.raises(ValueError, match=message):
        _cpp.embed_layer_norm_fwd(*ids, *inputs.values(), 1e-12, 0.0, None, 0)
    statistics = torch.ones(9), torch.ones(9)
    tables = list(inputs.values())[:4]
    with pytest.raises(ValueError, match=message):
        _cpp.embed_layer_norm_bwd(torch.ones(9, 64), *ids, *tables, *statistics, 0.0, None, 0)


def test_embedding_tables_that_do_not_fit_together() -> None:
    ids, inputs = embed_inputs(9, 64)
    with pytest.raises(ValueError, match="token_type_ids and token_type"):
        _cpp.embed_layer_norm_fwd(*ids[:2], None, *inputs.values(), 1e-12, 0.0, None, 0)
    inputs["position"] = inputs["position"].double()
    with pytest.raises(ValueError, match="embedding tables: got .*float64"):
        _cpp.embed_layer_norm_fwd(*ids, *inputs.values(), 1e-12, 0.0, None, 0)


@pytest.mark.parametrize("bad", [-1, 10, BIG])
def test_labels_out_of_range(bad: int) -> None:
    logits = torch.ones(3, 10)
    with pytest.raises(ValueError, match=rf"labels\[2\] = {bad} is outside \[0, 10\).*-100"):
        _cpp.cross_entropy_rows(logits, None, torch.tensor([0, -100, bad]), -100, torch.ones(1))
    assert torch.equal(logits, torch.ones(3, 10))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 5], r"index\[1\] = 5 is outside \[0, 5\)"),
        ([-1, 2], r"index\[0\] = -1 is outside \[0, 5\)"),
        ([0, 2, 2], r"index\[2\] = 2 does not ascend from index\[1\] = 2"),
        ([3, 1], r"index\[1\] = 1 does not ascend from index\[0\] = 3"),
    ],
)
def test_bad_index(index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cpp.gather_rows(torch.ones(5, 4), torch.tensor(index))
    with pytest.raises(ValueError, match=message):
        _cpp.scatter_rows(torch.ones(len(index), 4), torch.tensor(index), 5)


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "message"),
    [
        ([1, 6], 6, r"cu_seqlens\[0\] = 1 must be 0"),
        ([0, 4, 3, 6], 6, r"cu_seqlens\[2\] = 3 descends from cu_seqlens\[1\] = 4"),
        ([0, 4], 6, r"cu_seqlens\[1\] = 4 must end at the number of tokens, 6"),
        ([0, 7], 7, r"cu_seqlens\[1\] = 7 must end at the number of tokens, 6"),
        ([0, 1, 6], 4, r"sequence 1 of cu_seqlens has 5 tokens, more than max_seqlen = 4"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: list[int], max_seqlen: int, message: str) -> None:
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        _cpp.attention_fwd(torch.ones(6, 3, 2, 32), offsets, max_seqlen, 1.0, 0.0, None, 0)


def test_unknown_isa_is_refused_with_those_there_are() -> None:
    isa = _cpp.isa()
    with pytest.raises(ValueError, match=r"isa = 'amx9' is not available here.*portable"):
        _cpp.set_isa("amx9")
    assert _cpp.isa() == isa
    assert _cpp.available_isas()[-1] == "portable"


# ---------------------------------------------------------------------------------------- threads


def everything(rows: int = 1000, cols: int = 100) -> list[torch.Tensor]:
    """Every output of every row-wise op on one input."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, rows, cols, generator=generator)
    ids, inputs = embed_inputs(rows, cols)
    weight, bias = inputs["weight"], inputs["bias"]
    site = (0.3, torch.tensor([3]), 2)
    out = [_cpp.bias_gelu_fwd(x, bias, False), *_cpp.bias_gelu_bwd(dy, x, bias, True)]
    y, z, mean, rstd = _cpp.add_layer_norm_fwd(x, dy, bias, weight, bias, 1e-12, *site, True)
    out += [y, z, mean, rstd]
    out += _cpp.add_layer_norm_bwd(dy, z, weight, mean, rstd, *site, True)
    y, mean, rstd = _cpp.embed_layer_norm_fwd(*ids, *inputs.values(), 1e-12, *site)
    tables = list(inputs.values())[:4]
    out += [y, *_cpp.embed_layer_norm_bwd(dy, *ids, *tables, mean, rstd, *site)]
    logits, labels = dy.clone(), ids[2]
    out += [_cpp.cross_entropy_rows(logits, None, labels, 1, torch.ones(1)), logits]
    index = torch.arange(0, rows, 3)
    return [*out, _cpp.gather_rows(x, index), _cpp.scatter_rows(x[index], index, rows)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    threads(1)
    serial = everything()
    for count in (2, 3, 8):
        threads(count)
        assert same(everything(), serial)


def test_callers_in_several_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    expected, results = everything(), []
    callers = [threading.Thread(target=lambda: results.append(everything())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(same(result, expected) for result in results)


# In processes of their own: what they test is the state of a process.
PROLOGUE = """
import os, signal, sys
signal.alarm(60)
import numpy as np
from fastbert import _native
native = _native.cpu()
rows, cols = 500, 96
x = np.random.default_rng(0).standard_normal((rows, cols), np.float32)

def sums(threads):
    dx, dbias = np.full_like(x, np.nan), np.full(cols, np.nan, np.float32)
    bias = x[0].copy()
    native.bias_gelu_bwd(x.ctypes.data, x.ctypes.data, bias.ctypes.data, rows, cols, False,
                         dx.ctypes.data, dbias.ctypes.data, 0, 0, threads)
    return np.concatenate([dx.ravel(), dbias])

def check():
    expected = sums(1)
    assert not np.isnan(expected).any()
    assert all(np.array_equal(sums(n), expected) for n in (2, 3, 2, 5) for _ in range(20))

def check_in_child():
    child = os.fork()
    if child == 0:
        check()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""

PROCESSES = {
    "own_pool_and_fork": """
assert "torch" not in sys.modules
check()
check_in_child()
check()
from threading import Thread
callers = [Thread(target=check) for _ in range(4)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
""",
    "torch_loaded_late_and_fork": """
check()
import torch
torch.set_num_threads(2)
(torch.ones(1000, 1000) + 1).sum()
check()
check_in_child()
check()
""",
}


@pytest.mark.parametrize("name", PROCESSES)
def test_threads_of_a_process(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROLOGUE + PROCESSES[name]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
