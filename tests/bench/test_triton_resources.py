"""What a run of bench/triton_resources.py leaves of an earlier one."""

from __future__ import annotations

from .test_bench import _load


def row(case: str, arch: int, dtype: str, registers: int) -> dict[str, object]:
    return {"case": case, "arch": arch, "dtype": dtype, "registers": registers}


def test_what_is_not_compiled_again_stays() -> None:
    """In the order of cases, architectures and dtypes; a case that is no more goes."""
    resources = _load("triton_resources")
    first, second, *_ = resources.CASES
    earlier = [
        row(first, 80, "bf16", 1), row(first, 80, "bf16", 2), row(first, 90, "bf16", 3),
        row(second, 80, "fp16", 4), row("gone", 80, "bf16", 5),
    ]  # fmt: skip
    again = [row(second, 75, "fp32", 6), row(first, 80, "fp16", 7), row(first, 80, "bf16", 8)]
    merged = resources.merged(earlier, again)
    assert [one["registers"] for one in merged] == [8, 7, 3, 6, 4]
