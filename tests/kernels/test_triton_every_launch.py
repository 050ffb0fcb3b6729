"""What holds of every launcher: past 2^31 elements, off 16-byte boundaries, and every time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ._launches import LAUNCHES, ROWS, why_not_here
from ._parity import (
    DEVICE,
    INTERPRETED,
    KERNEL_MARKS,
    in_the_first_process,
    kernel_test,
    run_interpreted,
)

pytestmark = KERNEL_MARKS

# Where 32-bit offsets end; under the interpreter, which has no such end, some rows suffice to see
# that this test compares what it says.
LIMIT = 2**12 if INTERPRETED else 2**31
# Under the interpreter products are numpy's, whose BLAS may add up a row in another order at
# another place of a tile; a GPU's do not.
ROUNDED = ("feed_forward",) if INTERPRETED else ()


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


every_launch = pytest.mark.parametrize("name", LAUNCHES)


def launch_of(name, rows, p):
    reason = why_not_here(name)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    return LAUNCHES[name](rows, p)


def assert_as_good(ours, theirs):
    """The same but for roundings, of what was summed in another order."""
    tolerance = 16 * torch.finfo(theirs.dtype).eps
    largest = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * largest)


@kernel_test
@every_launch
def test_offsets_past_32_bits(name):
    """The last rows of huge tensors, otherwise zero, give what they give alone."""
    inputs, call, width = launch_of(name, ROWS, 0.0)
    rows = LIMIT // width + ROWS
    if not INTERPRETED:
        # Inputs and copies of those that are changed, and six outputs in 16 bits.
        needed = 2 * sum(x[0].nbytes for x in inputs.values()) * rows + 12 * LIMIT
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            pytest.skip(f"{free >> 30} GiB of GPU memory are free, and it takes {needed >> 30}")
    exact, close = call(**inputs)
    huge = {key: x.new_zeros(rows, *x.shape[1:]) for key, x in inputs.items()}
    for key, x in inputs.items():
        huge[key][-ROWS:] = x

    def last(x):
        return x[-ROWS:] if len(x) == rows else x

    huge_exact, huge_close = call(**huge)
    for mine, alone in zip(huge_exact, exact, strict=True):
        if name in ROUNDED:
            assert_as_good(last(mine), alone)
        else:
            assert torch.equal(last(mine), alone)
    for mine, alone in zip(huge_close, close, strict=True):
        assert_as_good(last(mine), alone)


def one_element_further(x):
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)
    return storage[1:].view(x.shape).copy_(x)


@kernel_test
@every_launch
def test_off_16_byte_boundaries(name):
    """Other machine code, with narrow accesses, and its sums perhaps in another order."""
    if name == "feed_forward":
        pytest.skip("ops/feed_forward.py hands it aligned matrices alone")
    inputs, call, _ = launch_of(name, ROWS, 0.1)
    aligned = call(**inputs)
    shifted = call(**{key: one_element_further(x) for key, x in inputs.items()})
    for ours, theirs in zip(aligned, shifted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a.is_floating_point():
                assert_as_good(b, a)
            else:
                assert ((a.int() - b.int()).abs() <= 1).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@kernel_test
@every_launch
def test_the_same_bits_a_hundred_times(name):
    """A race would show as a difference now and then."""
    width = launch_of(name, ROWS, 0.1).width
    inputs, call, _ = launch_of(name, 2**26 // width, 0.1)
    first = [x for part in call(**inputs) for x in part]
    for _ in range(100):
        again = [x for part in call(**inputs) for x in part]
        assert all(map(torch.equal, first, again))
