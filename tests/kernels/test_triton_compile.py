"""The machine code of the Triton kernels, compiled without a GPU by bench/triton_resources.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastbert.kernels import _attention_config, _config

SCRIPT = Path(__file__).parents[2] / "bench" / "triton_resources.py"
NO_PRODUCTS = {"attention_tile_list", "attention_dropout_mask"}
NARROW_LOADS = NO_PRODUCTS  # what they read are a few offsets
# A column sum ends with a few values a thread; the loss alone, a rank and a norm's share are one
# value a row or program.
NARROW_STORES = {
    "sum_partials", "join_chunks", "cross_entropy_rows", "attention_tile_list", "lamb_moments",
}  # fmt: skip


def compile_kernels(tmp_path, *options):
    out = tmp_path / "resources.json"
    command = [sys.executable, str(SCRIPT), "--jobs", "2", "--out", str(out), *options]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    result = json.loads(out.read_text())
    assert result["kernels"]
    return result


def matrix_instruction(row):
    """What multiplies in this kernel: None for full fp32 and for kernels without products."""
    if row["kernel"] == "linear_int8":
        # wgmma takes 64 rows or more; Triton has no int8 for sm_100's tcgen05.
        return "IGMMA" if row["arch"] == 90 and row["constants"]["BLOCK_M"] >= 64 else "IMMA"
    if row["kernel"] == "linear_fp8":
        # The small tile is widened to fp16 where e4m3 is for the larger instructions alone.
        large = row["constants"]["BLOCK_M"] >= 64 or row["arch"] == 89
        return {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}[row["arch"]] if large else "HMMA"
    products = row["kernel"].startswith(("attention", "feed_forward"))
    if not products or row["kernel"] in NO_PRODUCTS or row["dtype"] == "fp32":
        return None
    if row["kernel"].endswith("dkdv") and row["constants"]["BLOCK_N"] < 64 and row["arch"] >= 80:
        return "HMMA"  # too few keys for the larger instructions
    return {75: None, 80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[row["arch"]]


def check(result):
    """No spills, shared memory that the device has, its matrix unit, and 16-byte accesses."""
    for row in result["kernels"]:
        label = str(row)
        assert row["stack_bytes"] == 0 and row["spill_instructions"] == 0, label
        assert row["shared_bytes"] <= result["shared_limit"][str(row["arch"])], label
        wide_load = row["load_bits"] >= 128 or "UTMALDG" in row["copy_engine"]
        wide_store = row["store_bits"] >= 128 or "UTMASTG" in row["copy_engine"]
        of_norms = row["kernel"] == "sum_chunks" and row["case"].startswith("optimizer")
        assert wide_load or of_norms or row["kernel"] in NARROW_LOADS, label
        few_rows = row["kernel"] == "linear_int8" and row["constants"]["BLOCK_M"] == 16
        assert wide_store or of_norms or few_rows or row["kernel"] in NARROW_STORES, label
        assert row["matrix_instruction"] == matrix_instruction(row), label


def test_bert_base_bf16_on_hopper(tmp_path):
    result = compile_kernels(tmp_path, "--base", "--arch", "90", "--dtype", "bf16")
    check(result)
    engines = [r["copy_engine"] for r in result["kernels"] if r["kernel"].startswith("feed_f")]
    assert engines and all(engine == ["UTMALDG", "UTMASTG"] for engine in engines)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_case(tmp_path, arch, dtype):
    check(compile_kernels(tmp_path, "--arch", str(arch), "--dtype", dtype))


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("arch", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_attention_has_tiles_for_every_device(arch):
    largest = 128 if arch < (8, 0) else 256
    for head_dim in (1, 16, 31, 32, 33, 64, 80, 128, largest):
        for itemsize in (2, 4):
            for dropout in (False, True):
                for tile in _attention_config.tiles(head_dim, itemsize, dropout, arch):
                    assert all(map(is_power_of_two, (tile.block_m, tile.block_n, tile.num_warps)))
                    assert min(tile.block_m, tile.block_n) >= 16  # tl.dot's least


@pytest.mark.parametrize("width", [1, 3, 64, 96, 768, 1000, 1024, 5000, 16384])
def test_row_launch_choices(width):
    for block in (
        _config.layer_norm_fwd(width),
        _config.layer_norm_bwd(width, 2),
        _config.layer_norm_bwd(width, 4),
    ):
        assert block.block_h >= width and all(map(is_power_of_two, block))
    for tile in (_config.tile(width, 2), _config.tile(width, 4), _config.bias_gelu_bwd(width)):
        assert all(map(is_power_of_two, tile))
    assert all(map(is_power_of_two, _config.cross_entropy_rows(width)))
    assert all(map(is_power_of_two, _config.sum_chunks(width)))


def test_row_groups_never_outnumber_the_blocks():
    for arch in ((8, 0), (8, 9), (9, 0), (10, 0)):
        for num_blocks in (1, 5, 100_000):
            for column_blocks in (1, 12, 5000):
                groups = _config.row_groups(num_blocks, column_blocks, arch)
                assert 1 <= groups <= num_blocks
