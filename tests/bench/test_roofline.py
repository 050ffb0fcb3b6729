"""The least times: what they count, and that they are those the project's targets are made of."""

from __future__ import annotations

import math

import pytest

from fastbert import BertConfig
from fastbert.train import flops

from .test_bench import _load

SIZES = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}


@pytest.mark.parametrize(
    ("size", "training", "at_128", "at_512"),
    [("base", True, 690, 744), ("large", True, 2378, 2522), ("base", False, 221, 239)],
)
def test_compute_alone_on_an_h200(size: str, training: bool, at_128: int, at_512: int) -> None:
    """Nanoseconds a token at 790 TFLOP/s. The ops by themselves take no less, and training with
    everything fused that can be no more than half as long again."""
    roofline = _load("roofline")
    ceilings = roofline.Ceilings(4.3e12, 790e12)
    for length, expected in ((128, at_128), (512, at_512)):
        lengths = [length] * (32768 // length)
        found = roofline.floor(roofline.MODELS[size], lengths, training, ceilings)
        assert 1e9 * found.compute / 32768 == pytest.approx(expected, rel=0.005)
        assert found.compute < found.bound < 1.5 * found.compute


@pytest.mark.parametrize("size", SIZES)
def test_flops_are_those_that_the_other_benches_report(size: str) -> None:
    """Summed over ops here, over the model's matrices there."""
    roofline, masked_lm = _load("roofline"), _load("masked_lm")
    lengths = [128, 7, 512, 33]
    layers, hidden, heads, inner = SIZES[size]
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=inner,
    )  # fmt: skip
    model = roofline.MODELS[size]
    assert roofline.model_flops(model, lengths, True) == masked_lm.flops(size, lengths)
    assert roofline.model_flops(model, lengths, False) == flops.encoder_flops(config, lengths)


def test_parameters_of_base() -> None:
    shapes = _load("optimizers").base_shapes()
    whole = sum(map(math.prod, shapes))
    assert _load("roofline").MODELS["base"].parameters() == pytest.approx(whole, rel=0.01)


def test_the_bound_is_the_slower_of_the_two() -> None:
    roofline, work = _load("roofline"), _load("work")
    ceilings = roofline.Ceilings(copy=10.0, matrix=100.0)
    assert roofline.bound(work.Work(50, 100), ceilings) == 5.0
    assert roofline.bound(work.Work(50, 1000), ceilings) == 10.0
    assert roofline.bound(work.Work(50), ceilings) == 5.0


def test_a_row_says_how_near_its_bound_it_is() -> None:
    """At 1 s for 60 bytes and 20 FLOPs under ceilings of 100 and 50 a second: 60% of copy."""
    run, problem = _load("run"), _load("problem")
    one = problem.Problem(lambda: None, {}, 60, 20, lambda: problem.Parity(0.0))
    ceiling = {"copy_gb_s": 100e-9, "matrix_gflop_s": 50e-9}
    assert run._shares(one, 1.0, ceiling)["percent_of_bound"] == pytest.approx(60)
    one.flops = 45
    assert run._shares(one, 1.0, ceiling)["percent_of_bound"] == pytest.approx(90)


def test_given_ceilings_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = _load("roofline")
    here = roofline.Ceilings(1e9, 2e12)
    measured: list[object] = []
    monkeypatch.setattr(roofline, "measured", lambda: measured.append(here) or here)
    for options, first in (
        (["--copy", "4300", "--bf16", "790"], "copy 4,300 GB/s, bf16 products 790.0 TFLOP/s"),
        (["--copy", "4300"], "copy 4,300 GB/s, bf16 products 2.0 TFLOP/s"),
    ):
        monkeypatch.setattr("sys.argv", ["roofline.py", "--tokens", "512", *options])
        assert roofline.main() == 0
        assert capsys.readouterr().out.startswith(first)
    assert len(measured) == 1
