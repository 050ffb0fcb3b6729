"""What the tests of the Triton launchers share: where they run, their oracle, their criterion.

On CPU tensors the kernels run under Triton's interpreter, which has to be chosen before Triton is
imported: the ``test_under_the_interpreter`` of each file runs that file again in such a process.
Elsewhere its tests are the ``gpu`` twins of the same cases, with bf16 in addition.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton

from fastbert.kernels import rows

INTERPRETED = not isinstance(rows._gather_rows_kernel, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The interpreter multiplies bf16 matrices wrongly (Triton 3.6 to 3.9) and gets all else right.
DOT_DTYPES = [FP32, FP16] if INTERPRETED else [FP32, FP16, BF16]

EPS = 1e-12
SEED, SITE = (123456789 << 32) | 987654321, 5

KERNEL_MARKS = [
    pytest.mark.usefixtures("poisoned_outputs"),
    # NumPy, under the interpreter, announces each overflow that a kernel provides for.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def kernel_test(test):
    """A test that launches kernels: here if they are interpreted, else on a GPU."""
    if INTERPRETED:
        return test
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")
    return pytest.mark.gpu(skip(test))


in_the_first_process = pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")


def run_interpreted(path, folder):
    """Run the test file ``path`` under the interpreter, from ``folder``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    # From another folder: `python -m` would put the repository's root on sys.path.
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# --- oracle ------------------------------------------------------------------------------------


def philox_words(seed, offset, plane, row, col):
    """uint32 word of each broadcast position; straight from the paper, in 64-bit integers."""
    c = [np.asarray(v, np.uint64) for v in np.broadcast_arrays(col // 4, row, offset, plane)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> shift) ^ c[1] ^ k[0],
            product1 & low,
            (product0 >> shift) ^ c[3] ^ k[1],
            product0 & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.choose(np.broadcast_to(col % 4, c[0].shape), c).astype(np.uint32)


def dropout_factors(p, row, col, plane=0):
    """What dropout multiplies each position by: 0 or 1 / (1 - p)."""
    words = philox_words(SEED, SITE, plane, row, col)
    keep = words >= np.uint32(int(p * 2.0**32))
    return torch.from_numpy(np.where(keep, 1.0 / (1.0 - p), 0.0)).to(DEVICE)


def hidden_factors(p, shape):
    return dropout_factors(p, np.arange(shape[0])[:, None], np.arange(shape[1])[None, :])


def dropout_args(p):
    return p, torch.tensor([SEED], device=DEVICE) if p else None, SITE


def random(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def differentiate(formula, inputs, dout, dtype):
    """formula(**inputs) and its gradient by each input that is not None, computed in ``dtype``."""
    leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items() if x is not None}
    out = formula(**{**inputs, **leaves})
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_parity(ours, formula, inputs, dout):
    """Each result errs at most twice as much as torch in the same dtype, plus a few roundings."""
    dtype = dout.dtype
    exact = differentiate(formula, inputs, dout, torch.float64)
    plain = differentiate(formula, inputs, dout, dtype)
    assert ours.keys() <= exact.keys()
    for name, result in ours.items():
        assert result.shape == exact[name].shape, name
        scale = exact[name].abs().max().item() if exact[name].numel() else 0.0
        atol = 4 * torch.finfo(result.dtype).eps * max(scale, 1e-3)
        error = _error(result, exact[name])
        assert error <= 2 * _error(plain[name], exact[name]) + atol, (name, error, atol)


def _error(x, exact):
    difference = (x.double() - exact).abs()
    return difference.max().item() if difference.numel() else 0.0
