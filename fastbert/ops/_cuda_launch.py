"""The cuda backend: launchers that hand CUDA tensors to the compiled kernels of ``fastbert._cuda``.

Signatures and semantics are those of every backend (see ``fastbert.ops._registry``): contiguous
activations in, new tensors out, no autograd. Kernels run on torch's current stream of the tensors'
device; nothing here waits for it. The public functions of ``fastbert.ops`` check the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastbert import _native

Tensor = torch.Tensor

# csrc/cuda/ops.h, DType
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}


def attention_fwd(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_offset: int,
    bias: None = None,
) -> tuple[Tensor, Tensor]:
    """out (T, N, D) in qkv's dtype and lse (N, T) in fp32, from qkv (T, 3, N, D).

    The kernel takes no bias (``Op.no_bias``).
    """
    cu_seqlens = cu_seqlens.contiguous()
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    with _on_device_of(qkv):
        _native.cuda().attention_fwd(
            *map(_address, (qkv, cu_seqlens, out, lse)),
            tokens, cu_seqlens.shape[0] - 1, heads, head_dim, max_seqlen, softmax_scale,
            dropout_p, _address(dropout_seed), dropout_offset,
            _DTYPE_CODES[qkv.dtype], _stream(qkv),
        )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_offset: int,
    bias: None = None,
) -> Tensor:
    """dqkv (T, 3, N, D), from dout (T, N, D) and what forward took and gave."""
    cu_seqlens = cu_seqlens.contiguous()
    tokens, _, heads, head_dim = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    with _on_device_of(qkv):
        _native.cuda().attention_bwd(
            *map(_address, (dout, qkv, out, lse, cu_seqlens, dqkv, delta)),
            tokens, cu_seqlens.shape[0] - 1, heads, head_dim, max_seqlen, softmax_scale,
            dropout_p, _address(dropout_seed), dropout_offset,
            _DTYPE_CODES[qkv.dtype], _stream(qkv),
        )  # fmt: skip
    return dqkv


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """y = gelu(x + bias), x (T, I)."""
    (bias,) = _vectors(bias)
    y = torch.empty_like(x)
    with _on_device_of(x):
        _native.cuda().bias_gelu_fwd(
            *map(_address, (x, bias, y)), *x.shape, tanh, *_dtype_codes(x, bias), _stream(x)
        )
    return y


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor | None]:
    """dx (T, I) and dbias (I) = sum over rows of dx, None without a bias."""
    native = _native.cuda()
    (bias,) = _vectors(bias)
    dx = torch.empty_like(x)
    dbias = workspace = None
    if bias is not None:
        dbias = torch.empty_like(bias)
        workspace = _floats(x, native.bias_gelu_bwd_workspace(*x.shape))
    with _on_device_of(x):
        native.bias_gelu_bwd(
            *map(_address, (dy, x, bias, dx, dbias, workspace)), *x.shape, tanh,
            *_dtype_codes(x, bias), _stream(x),
        )  # fmt: skip
    return dx, dbias


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dropout_p: float, dropout_seed: Tensor | None, dropout_offset: int, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """y and, when ``save``, what backward needs: z = residual + dropout(x + x_bias), mean, rstd."""
    vectors = list(_vectors(x_bias, weight, bias))
    y = torch.empty_like(x)
    z = mean = rstd = None
    if save:
        z = torch.empty_like(x)
        mean, rstd = _floats(x, x.shape[0]), _floats(x, x.shape[0])
    with _on_device_of(x):
        _native.cuda().add_layer_norm_fwd(
            *map(_address, (x, residual, *vectors, y, z, mean, rstd)), *x.shape, eps,
            dropout_p, _address(dropout_seed), dropout_offset,
            *_dtype_codes(x, vectors[-1]), _stream(x),
        )  # fmt: skip
    return y, z, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, dropout_seed: Tensor | None, dropout_offset: int, need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dz; dx, which is dz itself without dropout; dweight, dbias and dx_bias in weight's dtype."""
    native = _native.cuda()
    weight = weight.contiguous()
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if dropout_p > 0.0 else None
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    dx_bias = torch.empty_like(weight) if need_x_bias else None
    workspace = _floats(z, native.add_layer_norm_bwd_workspace(*z.shape))
    outputs = (dz, dx, dweight, dbias, dx_bias, workspace)
    with _on_device_of(z):
        native.add_layer_norm_bwd(
            *map(_address, (dy, z, weight, mean, rstd, *outputs)), *z.shape,
            dropout_p, _address(dropout_seed), dropout_offset, *_dtype_codes(z, weight), _stream(z),
        )  # fmt: skip
    return dz, dz if dx is None else dx, dweight, dbias, dx_bias


def embed_layer_norm_fwd(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dropout_p: float, dropout_seed: Tensor | None, dropout_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H), mean and rstd (T). An id outside its table reads the nearest row."""
    vectors = list(_vectors(weight, bias))
    tokens, cols = input_ids.shape[0], word.shape[1]
    y = word.new_empty(tokens, cols)
    mean, rstd = _floats(word, tokens), _floats(word, tokens)
    inputs = (input_ids, position_ids, token_type_ids, word, position, token_type, *vectors)
    with _on_device_of(word):
        _native.cuda().embed_layer_norm_fwd(
            *map(_address, (*inputs, y, mean, rstd)), tokens, cols,
            *_entries(word, position, token_type), eps,
            dropout_p, _address(dropout_seed), dropout_offset,
            *_dtype_codes(word, vectors[0]), _stream(word),
        )  # fmt: skip
    return y, mean, rstd


def embed_layer_norm_bwd(
    dy: Tensor, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor | None, weight: Tensor,
    mean: Tensor, rstd: Tensor,
    dropout_p: float, dropout_seed: Tensor | None, dropout_offset: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """dword (V, H), dposition (P, H), dtoken_type (K, H) or None; dweight, dbias (H).

    The gradient of each token's summed embeddings is rounded to dy's dtype once; an id outside its
    table adds nothing to it.
    """
    native = _native.cuda()
    weight = weight.contiguous()
    tokens, cols = dy.shape
    de = torch.empty_like(dy)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    workspace = _floats(dy, native.embed_layer_norm_bwd_workspace(tokens, cols))
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    entries = _entries(*tables)
    with _on_device_of(dy):
        native.embed_layer_norm_bwd(
            *map(_address, (dy, *ids, *tables, weight, mean, rstd, de, dweight, dbias, workspace)),
            tokens, cols, *entries, dropout_p, _address(dropout_seed), dropout_offset,
            *_dtype_codes(dy, weight), _stream(dy),
        )  # fmt: skip
        grads = _embedding_gradients(de, ids, tables, entries)
    return *grads, dweight, dbias


def _embedding_gradients(
    de: Tensor,
    ids: tuple[Tensor, Tensor, Tensor | None],
    tables: tuple[Tensor, Tensor, Tensor | None],
    entries: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row i of a table's gradient is the sum of the rows of ``de`` (T, H) whose id is i."""
    native = _native.cuda()
    tokens, cols = de.shape
    places = tokens * (2 if ids[2] is None else 3)
    # A radix sort takes a pass a byte: sort the narrowest integers that hold every key.
    dtype = torch.int16 if sum(entries) <= torch.iinfo(torch.int16).max else torch.int32
    keys = de.new_empty(places, dtype=dtype)
    native.embedding_keys(
        *map(_address, (*ids, keys)), tokens, *entries, keys.element_size(), _stream(de)
    )
    keys, order = keys.sort(stable=True)
    dword, dposition = torch.zeros_like(tables[0]), torch.zeros_like(tables[1])
    dtoken_type = None if tables[2] is None else torch.zeros_like(tables[2])
    workspace = _floats(de, native.embedding_gradients_workspace(places, cols))
    native.embedding_gradients(
        *map(_address, (de, keys, order, dword, dposition, dtoken_type, workspace)),
        places, tokens, cols, *entries, keys.element_size(), _DTYPE_CODES[de.dtype], _stream(de),
    )  # fmt: skip
    return dword, dposition, dtoken_type


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _floats(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.float32)


def _dtype_codes(x: Tensor, vector: Tensor | None) -> tuple[int, int]:
    """Codes of the activations and of the vectors (bias, weight); without a vector, any will do."""
    return _DTYPE_CODES[x.dtype], _DTYPE_CODES[x.dtype if vector is None else vector.dtype]


def _entries(word: Tensor, position: Tensor, token_type: Tensor | None) -> tuple[int, int, int]:
    """The tables' numbers of rows, 0 for none."""
    return word.shape[0], position.shape[0], 0 if token_type is None else token_type.shape[0]


def _vectors(*vectors: Tensor | None) -> Iterator[Tensor | None]:
    """The vectors as the kernels take them: contiguous and of one dtype, fp32 where they differ."""
    mixed = len({v.dtype for v in vectors if v is not None}) > 1
    for v in vectors:
        yield None if v is None else (v.float() if mixed else v).contiguous()


def _on_device_of(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream
