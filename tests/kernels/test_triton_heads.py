"""What Triton computes for a head: cross_entropy_rows, gathered and scattered rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastbert.kernels import _config, cross_entropy, rows

from ._parity import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    KERNEL_MARKS,
    in_the_first_process,
    kernel_test,
    random,
    run_interpreted,
)

pytestmark = KERNEL_MARKS


@in_the_first_process
def test_under_the_interpreter(tmp_path):
    run_interpreted(__file__, tmp_path)


# --- cross_entropy_rows ------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("bias_dtype", [None, "same", FP32])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("num_classes", [256, 300, 7])
def test_cross_entropy_rows(num_classes, dtype, bias_dtype, monkeypatch):
    monkeypatch.setattr(_config, "cross_entropy_rows", lambda num_classes: (128, 4))
    torch.manual_seed(0)
    # Logits are computed in the sum's dtype: the exact answer is about the same rounded inputs.
    storage = random(9, num_classes + 8, dtype=dtype, scale=5.0)
    logits, padding = storage[:, :num_classes], storage[:, num_classes:].clone()
    bias = None
    if bias_dtype is not None:
        bias = random(num_classes, dtype=dtype if bias_dtype == "same" else bias_dtype)
    labels = torch.randint(num_classes, (9,), device=DEVICE)
    labels[[2, 8]] = -100
    u = logits.double() + (0 if bias is None else bias.double())
    exact = F.cross_entropy(u, labels, ignore_index=-100, reduction="none")
    scale = torch.tensor([0.37], device=DEVICE)
    onehot = F.one_hot(labels.clamp(min=0), num_classes)
    exact_grad = (u.softmax(1) - onehot) * (labels != -100)[:, None] * scale.double()

    before = logits.clone()
    loss = cross_entropy.cross_entropy_rows(logits, bias, labels, -100, None)
    assert torch.equal(logits, before)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(cross_entropy.cross_entropy_rows(logits, bias, labels, -100, scale), loss)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact_grad, rtol=eps, atol=max(1e-6, eps / 100))
    assert torch.equal(storage[:, num_classes:], padding)


@kernel_test
def test_cross_entropy_of_bad_labels_and_extreme_logits():
    logits = torch.tensor([[1.0] * 5, [2.0] * 5, [-torch.inf] * 4 + [3e4], [0.0] * 5, [1e4] * 5])
    logits = logits.repeat_interleave(200, 1).to(DEVICE)  # classes in runs of 200
    labels = torch.tensor([1000, -1, 999, -100, 3], device=DEVICE)
    exact = F.cross_entropy(logits[2:].double(), labels[2:], reduction="none", ignore_index=-100)
    scale = torch.ones(1, device=DEVICE)
    loss = cross_entropy.cross_entropy_rows(logits, None, labels, -100, scale)
    assert loss[:2].isnan().all() and logits[:2].isnan().all()
    torch.testing.assert_close(loss[2:].double(), exact, rtol=1e-6, atol=1e-6)
    assert logits[2:].isfinite().all() and (logits[3] == 0).all()


# --- rows --------------------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [64, 600, 3])
def test_gather_and_scatter_rows(width, dtype):
    x = random(70, width, dtype=dtype)
    index = torch.arange(1, 70, 3, device=DEVICE)
    gathered = rows.gather_rows(x, index)
    assert torch.equal(gathered, x[index])
    scattered = rows.scatter_rows(gathered, index, 70)
    assert torch.equal(scattered[index], gathered)
    scattered[index] = 0
    assert (scattered == 0).all()


@kernel_test
def test_rows_out_of_range_are_neither_read_nor_written():
    x = random(4, 64)
    index = torch.tensor([-1, 1, 4, 2**40], device=DEVICE)
    gathered = rows.gather_rows(x, index)
    assert torch.equal(gathered[1], x[1]) and (gathered[[0, 2, 3]] == 0).all()
    scattered = rows.scatter_rows(x, index, 4)
    assert torch.equal(scattered[1], x[1]) and (scattered[[0, 2, 3]] == 0).all()
