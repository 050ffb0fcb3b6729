"""Launch every GPU kernel once or twice on small, ragged shapes, for compute-sanitizer:

    python bench/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench/sanitize.py
    compute-sanitizer --tool racecheck python bench/sanitize.py

The first run compiles the kernels, which takes much longer under the tool. Without torch's cache of
memory every tensor is an allocation of its own, past whose end memcheck sees.
An op that a backend does not serve is passed over and named; any other error ends the run, as what
follows an error of the device means nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import torch

from fastbert import ops
from fastbert.train import AdamW, Lamb

Call = Callable[[], object]
LENGTHS = (70, 0, 1, 33)
HIDDEN, INNER, HEADS = 96, 200, 3


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Name and call of every op, with gradients where it has them."""
    tokens = sum(LENGTHS)
    seed = torch.ones(1, dtype=torch.int64, device="cuda")
    cu_seqlens = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    def differentiated(function: Call) -> Call:
        def call() -> None:
            out = function()
            (out[0] if isinstance(out, tuple) else out).sum().backward()

        return call

    x, residual, vector = leaf(tokens, HIDDEN), leaf(tokens, HIDDEN), leaf(HIDDEN)
    for p in (0.0, 0.1):
        dropout = {"dropout_p": p, "dropout_seed": seed}
        for dim in (32, 64):
            qkv = leaf(tokens, 3, HEADS, dim)
            bias = torch.randn(1, tokens, max(LENGTHS), device="cuda")
            for b in (None, bias):
                yield (
                    f"attention D={dim} p={p} bias={b is not None}",
                    differentiated(
                        lambda qkv=qkv, b=b, dropout=dropout: ops.attention(
                            qkv, cu_seqlens, max(LENGTHS), bias=b, **dropout
                        )
                    ),
                )
        yield (
            f"add_layer_norm p={p}",
            differentiated(
                lambda dropout=dropout: ops.add_layer_norm(
                    x, residual, vector, vector, x_bias=vector, **dropout
                )
            ),
        )
        ids = torch.randint(31, (tokens,), device="cuda")
        word, types = leaf(31, HIDDEN), leaf(31, HIDDEN)
        yield (
            f"embed_layer_norm p={p}",
            differentiated(
                lambda dropout=dropout, ids=ids, word=word, types=types: ops.embed_layer_norm(
                    ids, ids, ids, word, word, types, vector, vector, **dropout
                )
            ),
        )
    yield "bias_gelu", differentiated(lambda: ops.bias_gelu(x, vector))
    w1, b1, w2 = leaf(INNER, HIDDEN), leaf(INNER), leaf(HIDDEN, INNER)
    module = importlib.import_module("fastbert.ops.feed_forward")

    def fused() -> None:
        before, module.FUSED = module.FUSED, frozenset({"fwd", "bwd"})
        try:
            differentiated(lambda: ops.feed_forward(x, w1, b1, w2))()
        finally:
            module.FUSED = before

    yield "feed_forward fused", fused
    index = torch.arange(0, tokens, 2, device="cuda")
    yield "gather_rows", differentiated(lambda: ops.gather_rows(x, index))
    half = leaf(len(index), HIDDEN)
    yield "scatter_rows", differentiated(lambda: ops.scatter_rows(half, index, tokens))
    labels, decoder = torch.randint(59, (tokens,), device="cuda"), leaf(59, HIDDEN)
    yield (
        "linear_cross_entropy",
        differentiated(lambda: ops.linear_cross_entropy(x, decoder, None, labels)),
    )
    fixed = x.detach()

    def int8() -> None:
        q, scale, offset = ops.quantize_rows(fixed)
        wq, w_scale, _ = ops.quantize_rows(w1.detach())
        sums = ops.column_sums(wq, w_scale)
        ops.linear_int8(q, scale, wq, w_scale, offset=offset, column_sum=sums, activation="gelu")
        ops.linear_int8(q, scale, wq, w_scale, output_scale=scale[:1].contiguous())
        ops.add_layer_norm_int8(fixed, fixed, vector.detach(), vector.detach())

    yield "int8", int8
    yield (
        "fp8",
        lambda: ops.linear_fp8(*ops.quantize_rows_fp8(fixed), *ops.quantize_rows_fp8(w1.detach())),
    )
    for kind in (AdamW, Lamb):

        def step(kind: type = kind) -> None:
            parameters = [torch.nn.Parameter(leaf(n).detach()) for n in (7, 5000, 40000)]
            for p in parameters:
                p.grad = torch.randn_like(p)
            kind(parameters, 1e-3, max_grad_norm=1.0).step()

        yield kind.__name__, step


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize: torch finds no CUDA device", file=sys.stderr)
        return 3
    for backend in ("triton", "cuda"):
        try:
            ops.use_backend(backend)
        except ops.BackendError as error:
            print(f"{backend}: {error}")
            continue
        for name, call in calls(torch.bfloat16):
            try:
                call()
                torch.cuda.synchronize()
                print(f"{backend} {name}: ran")
            except (ops.BackendError, NotImplementedError) as error:
                print(f"{backend} {name}: {error}")
            except Exception as error:
                print(f"{backend} {name}: {type(error).__name__}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
