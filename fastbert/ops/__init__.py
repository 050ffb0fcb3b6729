"""The ops: mathematical contracts, each with a torch reference and several ways to compute it."""

from fastbert.ops._registry import BACKENDS, OPS, BackendError, choices, use_backend
from fastbert.ops.add_layer_norm import add_layer_norm, add_layer_norm_int8
from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.embed_layer_norm import embed_layer_norm
from fastbert.ops.feed_forward import feed_forward
from fastbert.ops.linear import linear
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.linear_fp8 import linear_fp8, quantize_rows_fp8
from fastbert.ops.linear_int8 import column_sums, linear_int8, quantize_rows
from fastbert.ops.packed_layout import packed_layout
from fastbert.ops.qkv_linear import qkv_linear
from fastbert.ops.rows import gather_rows, scatter_rows

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "add_layer_norm",
    "add_layer_norm_int8",
    "attention",
    "bias_gelu",
    "choices",
    "embed_layer_norm",
    "feed_forward",
    "gather_rows",
    "linear",
    "linear_cross_entropy",
    "column_sums",
    "linear_fp8",
    "linear_int8",
    "packed_layout",
    "qkv_linear",
    "quantize_rows",
    "quantize_rows_fp8",
    "scatter_rows",
    "use_backend",
]
