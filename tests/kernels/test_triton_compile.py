"""The machine code of the Triton kernels, compiled without a GPU by bench/triton_resources.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "bench" / "triton_resources.py"
MATRIX_INSTRUCTION = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def compile_kernels(tmp_path, *options):
    out = tmp_path / "resources.json"
    command = [sys.executable, str(SCRIPT), "--jobs", "2", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    result = json.loads(out.read_text())
    assert result["kernels"]
    return result


def check(result):
    """No spills, shared memory that the device has, the matrix unit, and 16-byte accesses."""
    for row in result["kernels"]:
        label = f"{row['kernel']} ({row['case']}, sm_{row['arch']}, {row['dtype']}): {row}"
        assert row["stack_bytes"] == 0 and row["spill_instructions"] == 0, label
        assert row["shared_bytes"] <= result["shared_limit"][str(row["arch"])], label
        assert row["load_bits"] >= 128, label
        assert row["store_bits"] >= 128 or row["kernel"] in NARROW_STORES, label
        if row["kernel"].startswith("attention") and row["dtype"] != "fp32":
            assert row["matrix_instruction"] == MATRIX_INSTRUCTION[row["arch"]], label


# A column sum ends with a few values a thread; the loss alone is one value a row.
NARROW_STORES = {"sum_partials", "join_chunks", "cross_entropy_rows"}


def test_bert_base_bf16_on_hopper(tmp_path):
    check(compile_kernels(tmp_path, "--base", "--arch", "90", "--dtype", "bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_case(tmp_path, arch, dtype):
    check(compile_kernels(tmp_path, "--arch", str(arch), "--dtype", dtype))
