"""Memory that is used again: whatever is in it, and never before all who see it have let go."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbert import _native
from fastbert.ops import _recycled, embed_layer_norm, use_backend
from fastbert.ops._recycled import recycled_like

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, HIDDEN, TOKENS = 211, 24, 40


@pytest.fixture(autouse=True)
def empty_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recycled, "_spare", {})


def spares(size: int) -> int:
    return len(_recycled._spare.get(size, []))


# --- the memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (1,), (), (0, 3), (2, 0)])
def test_like(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype)
    like = recycled_like(x.t() if len(shape) == 2 else x)
    assert like.dtype == dtype and like.is_contiguous()
    assert like.shape == (shape[::-1] if len(shape) == 2 else shape)
    assert like.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize(
    "alias",
    [
        lambda x: x,
        lambda x: x.detach(),
        lambda x: x.data,
        lambda x: x[1:2, ::2],
        lambda x: x.view(torch.int32),
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: (x.requires_grad_() ** 2).sum(),  # saves x for its backward
    ],
    ids=["itself", "detach", "data", "slice", "view", "numpy", "storage", "graph"],
)
def test_who_holds_an_alias_holds_the_memory(alias: Callable[[torch.Tensor], Any]) -> None:
    x = recycled_like(torch.empty(8, 4))
    address = x.data_ptr()
    held = alias(x)
    del x
    other = recycled_like(torch.empty(8, 4))
    assert other.data_ptr() != address and spares(128) == 0
    del held
    gc.collect()
    assert spares(128) == 1
    assert recycled_like(torch.empty(4, 8)).data_ptr() == address  # of this many bytes, any shape


def test_no_more_than_two_are_kept() -> None:
    held = [recycled_like(torch.empty(8)) for _ in range(5)]
    assert spares(32) == 0
    held.clear()
    assert spares(32) == 2 and spares(64) == 0


def test_a_fork_has_memory_of_its_own() -> None:
    recycled_like(torch.empty(100)).fill_(
        1.0
    )  # few, or torch's threads would be missed by the child
    child = os.fork()
    if child == 0:
        x = recycled_like(torch.empty(100))  # what the parent has on its shelf
        ok = bool((x == 1.0).all())
        x.fill_(2.0)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((recycled_like(torch.empty(100)) == 1.0).all())


# --- the gradient in it ------------------------------------------------------------------------


@pytest.fixture
def cpp() -> Iterator[None]:
    if _native.cpu_reason() is not None:
        assert not _native.build_info(), _native.cpu_reason()
        pytest.skip(str(_native.cpu_reason()))
    with use_backend("cpp"):
        yield


class Step:
    """A table of words, and the loss of the ``seed``-th batch under it."""

    def __init__(self, tied: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.word = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=draw))
        self.position = torch.randn(TOKENS, HIDDEN, generator=draw)
        self.ones = torch.ones(HIDDEN)
        self.tied = tied

    def loss(self, seed: int, plain: bool = False) -> torch.Tensor:
        draw = torch.Generator().manual_seed(100 + seed)
        ids = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
        weights = torch.randn(TOKENS, HIDDEN, generator=draw)
        places = torch.arange(TOKENS)
        if plain:
            e = F.embedding(ids, self.word) + self.position
            y = F.layer_norm(e, (HIDDEN,), self.ones, self.ones, 1e-12)
        else:
            tables = (self.word, self.position, None, self.ones, self.ones)
            y = embed_layer_norm(ids, places, None, *tables)
        loss = (y * weights).sum()
        return loss + (y @ self.word.t()).square().mean() if self.tied else loss

    def expected(self, *seeds: int) -> torch.Tensor:
        """The gradient of the losses' sum, by torch's embedding."""
        losses = [self.loss(seed, plain=True) for seed in seeds]
        return torch.autograd.grad(torch.stack(losses).sum(), self.word)[0]

    def check(self, *seeds: int) -> None:
        assert self.word.grad is not None
        expected = self.expected(*seeds)
        torch.testing.assert_close(self.word.grad, expected, rtol=1e-4, atol=1e-5)
        if not self.tied:
            assert torch.equal(self.word.grad == 0, expected == 0)  # untouched rows are 0 exactly


def scale_in_place(grad: torch.Tensor) -> None:
    torch._foreach_mul_([grad], 0.5)


def write_nan(grad: torch.Tensor) -> None:
    grad.fill_(float("nan"))


def write_behind_the_version(grad: torch.Tensor) -> None:
    grad.data[::2] = 7.0


def write_by_numpy(grad: torch.Tensor) -> None:
    grad.numpy()[:] = -0.0


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(
    "write", [scale_in_place, write_nan, write_behind_the_version, write_by_numpy]
)
def test_what_was_written_into_the_last_gradient_is_gone(
    write: Callable[[torch.Tensor], None],
) -> None:
    step = Step()
    addresses = set()
    for seed in range(4):
        step.word.grad = None
        step.loss(seed).backward()
        step.check(seed)
        assert not (step.word.grad.signbit() & (step.word.grad == 0)).any()
        addresses.add(step.word.grad.data_ptr())
        write(step.word.grad)
    assert len(addresses) == 1  # and the memory was used again


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_accumulate(tied: bool) -> None:
    """Three backwards an update; with a tied decoder two gradients meet in each."""
    step = Step(tied)
    for update in range(3):
        step.word.grad = None
        seeds = [3 * update + i for i in range(3)]
        for seed in seeds:
            step.loss(seed).backward()
        step.check(*seeds)
    for seed in range(20, 23):  # and into zeros that stay where they are
        step.word.grad.zero_()
        step.loss(seed).backward()
        step.check(seed)


@pytest.mark.usefixtures("cpp")
def test_a_graph_that_is_kept_is_walked_twice() -> None:
    step = Step()
    loss = step.loss(0)
    (first,) = torch.autograd.grad(loss, step.word, retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, step.word, retain_graph=True)
    assert torch.equal(first, before) and torch.equal(first, second)
    loss.backward()
    step.check(0)


@pytest.mark.usefixtures("cpp")
def test_gradients_that_are_held_stay() -> None:
    step = Step()
    held = []
    for seed in range(4):
        step.word.grad = None
        step.loss(seed).backward()
        held.append(step.word.grad)
    for seed, grad in enumerate(held):
        torch.testing.assert_close(grad, step.expected(seed), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cpp")
def test_threads_do_not_share() -> None:
    """Models of one size, each trained by a thread of its own."""
    failures: list[BaseException] = []

    def train(number: int) -> None:
        try:
            step = Step()
            for seed in range(10 * number, 10 * number + 10):
                step.word.grad = None
                step.loss(seed).backward()
                step.check(seed)
        except BaseException as error:  # a thread's own would only be printed
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
