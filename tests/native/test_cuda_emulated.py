"""The CUDA kernels executed on the CPU: the sources that nvcc compiles, through a small emulation.

Inputs end where readable memory ends, outputs and shared memory start as NaN, asynchronous copies
arrive as late as their wait allows: what a GPU may do, the emulation does.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from .cuda_emulator import checks, emulator, formulas
from .cuda_emulator.emulator import ONE_BLOCK, TWO_KERNELS, misaligned

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
DROPOUT = pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p.3"])
place = emulator.fenced


def test_philox_gives_the_known_answer() -> None:
    words = formulas.philox_words(0, 0, 0, 0, np.arange(4))
    assert [f"{w:08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 64), (1, 64), (37, 96), (70, 768), (9, 1000), (40, 13)], ids=str
)
def test_bias_gelu(
    launch: ModuleType, shape: tuple[int, int], dtype: torch.dtype, tanh: bool
) -> None:
    checks.bias_gelu(launch, place, *shape, dtype, dtype, tanh)


@pytest.mark.parametrize("vector_dtype", [None, FP32], ids=["no bias", "fp32 bias"])
def test_bias_gelu_with_other_biases(launch: ModuleType, vector_dtype: torch.dtype | None) -> None:
    checks.bias_gelu(launch, place, 5, 96, BF16, vector_dtype, False)


def test_bias_gelu_off_16_byte_boundaries(launch: ModuleType) -> None:
    checks.bias_gelu(launch, misaligned, 5, 96, BF16, BF16, False)


def test_bias_gelu_of_huge_and_special_values(launch: ModuleType) -> None:
    x = torch.tensor([[1e30, -1e30, 3e38, -3e38, 12.0, -12.0, 0.0, float("nan")]])
    one = torch.ones_like(x)
    for tanh in (False, True):
        y = launch.bias_gelu_fwd(place(x), None, tanh)
        dx, _ = launch.bias_gelu_bwd(place(one), place(x), None, tanh)
        assert y[0, :7].tolist() == pytest.approx([1e30, 0, 3e38, 0, 12, 0, 0], 1e-6, 1e-9)
        assert dx[0, :7].tolist() == pytest.approx([1, 0, 1, 0, 1, 0, 0.5], 1e-6, 1e-9)
        assert y[0, 7].isnan() and dx[0, 7].isnan()


@DROPOUT
@DTYPES
@pytest.mark.parametrize("cols", [64, 96, 768, 1000, 1024, 1160, 13])
def test_add_layer_norm(launch: ModuleType, cols: int, dtype: torch.dtype, p: float) -> None:
    checks.add_layer_norm(launch, place, 11, cols, dtype, dtype, p=p)


@DROPOUT
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("cols", [96, 1160])
def test_add_layer_norm_over_rows(launch: ModuleType, rows: int, cols: int, p: float) -> None:
    checks.add_layer_norm(launch, place, rows, cols, BF16, FP32, p=p)


@pytest.mark.parametrize("cols", [96, 13])
def test_add_layer_norm_without_the_optional_inputs(launch: ModuleType, cols: int) -> None:
    checks.add_layer_norm(launch, place, 6, cols, FP16, FP32, residual=False, x_bias=False)


@pytest.mark.parametrize("cols", [96, 1160])
def test_add_layer_norm_variance_takes_two_passes(launch: ModuleType, cols: int) -> None:
    checks.add_layer_norm(launch, place, 6, cols, FP32, FP32, mean=1000.0)


def test_add_layer_norm_off_16_byte_boundaries(launch: ModuleType) -> None:
    checks.add_layer_norm(launch, misaligned, 6, 96, BF16, BF16, p=0.3)


def test_add_layer_norm_promotes_mixed_vectors(launch: ModuleType) -> None:
    x = torch.randn(4, 64).bfloat16()
    weight, bias, x_bias = torch.randn(3, 64).bfloat16()
    alike = launch.add_layer_norm_fwd(x, None, x_bias, weight, bias, 1e-5, 0.0, None, 0, True)
    mixed = launch.add_layer_norm_fwd(
        x, None, x_bias, weight.float(), bias, 1e-5, 0.0, None, 0, True
    )
    assert all(torch.equal(a, b) for a, b in zip(alike, mixed, strict=True))


@DROPOUT
@DTYPES
@pytest.mark.parametrize("cols", [13, 64, 96, 384, 768, 1000, 1024, 2048])
def test_embed_layer_norm(launch: ModuleType, cols: int, dtype: torch.dtype, p: float) -> None:
    checks.embed_layer_norm(launch, place, 30, cols, dtype, dtype, p=p)


@pytest.mark.parametrize("ids", ["random", "same", "outside"])
@pytest.mark.parametrize("rows", [0, 1, 65, 1027])
@pytest.mark.parametrize("cols", [13, 64])
def test_embed_layer_norm_over_rows(launch: ModuleType, rows: int, cols: int, ids: str) -> None:
    checks.embed_layer_norm(launch, place, rows, cols, FP32, FP32, p=0.3, ids=ids)


def test_embed_layer_norm_of_a_run_over_many_chunks(launch: ModuleType) -> None:
    rows = 4200  # 65 chunks of 64 places and a part of one; a block joins 64 at a time
    checks.embed_layer_norm(launch, place, rows, 16, FP32, FP32, ids="same")


@pytest.mark.parametrize("cols", [13, 96, 1160])
@pytest.mark.parametrize("entries", [(50, 7, 0), (1, 1, 1)], ids=["no token types", "one row"])
def test_embed_layer_norm_of_other_tables(
    launch: ModuleType, entries: tuple[int, int, int], cols: int
) -> None:
    for ids in ("random", "outside"):
        checks.embed_layer_norm(launch, place, 70, cols, BF16, FP32, entries=entries, ids=ids)


@pytest.mark.parametrize("token_types", [1, 2], ids=["int16", "int32"])
def test_embed_layer_norm_at_the_limit_of_keys(launch: ModuleType, token_types: int) -> None:
    entries = (32_700, 66, token_types)
    checks.embed_layer_norm(launch, place, 70, 16, FP16, FP16, entries=entries, ids="outside")


def test_embed_layer_norm_off_16_byte_boundaries(launch: ModuleType) -> None:
    checks.embed_layer_norm(launch, misaligned, 40, 96, BF16, BF16, p=0.3)


def test_a_workspace_off_16_byte_boundaries(
    launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = launch._floats
    monkeypatch.setattr(launch, "_floats", lambda like, count: misaligned(floats(like, count)))
    checks.embed_layer_norm(launch, place, 70, 96, BF16, BF16)
    checks.embed_layer_norm(launch, place, 70, 1160, BF16, BF16)
    checks.add_layer_norm(launch, place, 70, 96, BF16, BF16, p=0.3)
    checks.add_layer_norm(launch, place, 70, 1160, BF16, BF16)
    checks.bias_gelu(launch, place, 70, 96, BF16, BF16, False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_embed_layer_norm_does_not_depend_on_timing(
    launch: ModuleType, emulated: emulator.EmulatedCuda, reverse: bool, eager: bool
) -> None:
    def run() -> tuple[torch.Tensor, ...]:
        return checks.embed_layer_norm(launch, place, 300, 40, BF16, BF16, p=0.3)

    usual = run()
    emulated.configure(reverse_threads=reverse, eager_copies=eager)
    for got, want in zip(run(), usual, strict=True):
        assert torch.equal(got, want)


def test_sums_over_many_groups_of_rows(launch: ModuleType) -> None:
    rows = 1100  # 35 groups; a block adds 16 at a time
    checks.bias_gelu(launch, place, rows, 16, FP16, FP32, True)
    checks.add_layer_norm(launch, place, rows, 16, FP16, FP32)


def test_no_kernel_writes_past_its_outputs(emulated: emulator.EmulatedCuda) -> None:
    """As the launchers call them, but with outputs that end where writable memory ends."""
    rows, cols, heads, head_dim = 67, 96, 3, 32
    wide = place(torch.randn(rows, 3 * cols).bfloat16())
    x, dy = (place(torch.randn(rows, cols).bfloat16()) for _ in range(2))
    vector = place(torch.randn(cols))
    out, dx, z = (place(torch.empty(rows, cols).bfloat16()) for _ in range(3))
    grads = [place(torch.empty(cols)) for _ in range(3)]
    mean, rstd = place(torch.zeros(rows)), place(torch.ones(rows))
    lse, bounds = place(torch.empty(heads, rows)), place(torch.tensor([0, 67]).int())
    seed = place(torch.tensor([checks.SEED]))
    gelu_space = place(torch.empty(emulated.bias_gelu_bwd_workspace(rows, cols)))
    norm_space = place(torch.empty(emulated.add_layer_norm_bwd_workspace(rows, cols)))
    ids, table = place(torch.randint(9, (rows,))), place(torch.randn(9, cols).bfloat16())
    tables = (ids, ids, ids, table, table, table, vector)
    embed_space = place(torch.empty(emulated.embed_layer_norm_bwd_workspace(rows, cols)))
    keys = place(torch.zeros(3 * rows).short())
    dtables = [place(torch.zeros(9, cols).bfloat16()) for _ in range(3)]
    table_space = place(torch.empty(emulated.embedding_gradients_workspace(3 * rows, cols)))

    def at(*tensors: torch.Tensor | None) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in tensors]

    bf16, fp32, stream = 1, 0, 0
    emulated.attention_fwd(
        *at(wide, bounds, out, lse), rows, 1, heads, head_dim, rows, 0.2, 0.1, *at(seed), 0,
        bf16, stream,
    )  # fmt: skip
    for width, device in (32, ONE_BLOCK), (32, TWO_KERNELS), (24, ONE_BLOCK):
        emulated.configure(shared_bytes=device)
        packed = place(torch.randn(rows, 3, heads, width).bfloat16())
        dout, forward = (place(torch.randn(rows, heads, width).bfloat16()) for _ in range(2))
        dqkv, delta = place(torch.empty_like(packed)), place(torch.empty_like(lse))
        emulated.attention_bwd(
            *at(dout, packed, forward, lse, bounds, dqkv, delta), rows, 1, heads, width, rows, 0.2,
            0.1, *at(seed), 0, bf16, stream,
        )  # fmt: skip
    emulated.configure()
    emulated.bias_gelu_fwd(*at(x, vector, out), rows, cols, False, bf16, fp32, stream)
    emulated.bias_gelu_bwd(
        *at(dy, x, vector, dx, grads[0], gelu_space), rows, cols, False, bf16, fp32, stream
    )
    emulated.add_layer_norm_fwd(
        *at(x, dy, vector, vector, vector, out, z, mean, rstd), rows, cols, 1e-5, 0.1, *at(seed), 0,
        bf16, fp32, stream,
    )  # fmt: skip
    emulated.add_layer_norm_bwd(
        *at(dy, z, vector, mean, rstd, out, dx, *grads, norm_space), rows, cols, 0.1, *at(seed), 0,
        bf16, fp32, stream,
    )  # fmt: skip
    emulated.embed_layer_norm_fwd(
        *at(*tables, vector, out, mean, rstd), rows, cols, 9, 9, 9, 1e-5, 0.1, *at(seed), 0,
        bf16, fp32, stream,
    )  # fmt: skip
    emulated.embed_layer_norm_bwd(
        *at(dy, *tables, mean, rstd, dx, *grads[:2], embed_space), rows, cols, 9, 9, 9,
        0.1, *at(seed), 0, bf16, fp32, stream,
    )  # fmt: skip
    emulated.embedding_keys(*at(ids, ids, ids, keys), rows, 9, 9, 9, 2, stream)
    sorted_keys, order = map(place, keys.sort(stable=True))
    emulated.embedding_gradients(
        *at(dx, sorted_keys, order, *dtables, table_space), 3 * rows, rows, cols,
        9, 9, 9, 2, bf16, stream,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": 2}, "dtype code 2"),
        ({"vector_dtype": 3}, "vector dtype code 3"),
        ({"dropout_p": 1.0}, "dropout_p is 1"),
        ({"dropout_p": 0.5}, "dropout_seed is missing"),
        ({"rows": 2**40}, "too large"),
    ],
)
def test_bad_arguments_are_named(
    emulated: emulator.EmulatedCuda, change: dict[str, float], text: str
) -> None:
    given = {"rows": 1, "cols": 8, "eps": 1e-5, "dropout_p": 0.0, "dropout_seed": 0,
             "dropout_offset": 0, "dtype": 1, "vector_dtype": 0, "stream": 0, **change}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"add_layer_norm_fwd: .*{text}"):
        emulated.add_layer_norm_fwd(*[0] * 9, *given.values())


@pytest.mark.parametrize(
    ("entries", "key_bytes", "text"),
    [
        ((9, 9, 9), 8, "key_bytes is 8"),
        ((32_760, 5, 3), 2, "32768 table rows do not fit keys of 2 bytes"),
        ((2**31, 0, 0), 4, "too large"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    emulated: emulator.EmulatedCuda, entries: tuple[int, int, int], key_bytes: int, text: str
) -> None:
    with pytest.raises(RuntimeError, match=f"embedding_keys: .*{text}"):
        emulated.embedding_keys(0, 0, 0, 0, 1, *entries, key_bytes, 0)
    with pytest.raises(RuntimeError, match=f"embedding_gradients: .*{text}"):
        emulated.embedding_gradients(*[0] * 7, 3, 1, 8, *entries, key_bytes, 1, 0)


def test_rows_too_wide_for_a_grid_are_refused(emulated: emulator.EmulatedCuda) -> None:
    cols = 65535 * 32 + 1  # one column more than the blocks of one launch sum
    with pytest.raises(RuntimeError, match="embedding_gradients: too large: needs 65536 thread"):
        emulated.embedding_gradients(*[0] * 7, 3, 1, cols, 9, 9, 9, 2, 1, 0)


def test_a_table_without_rows_is_refused(launch: ModuleType) -> None:
    ids, table, none = torch.zeros(3, dtype=torch.int64), torch.ones(4, 8), torch.ones(0, 8)
    for tables in ((none, table, table), (table, none, table), (table, table, none)):
        with pytest.raises(RuntimeError, match="embed_layer_norm_fwd: a table without rows"):
            launch.embed_layer_norm_fwd(
                ids, ids, ids, *tables, table[0], table[0], 1e-5, 0.0, None, 0
            )
