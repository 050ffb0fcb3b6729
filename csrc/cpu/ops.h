// The CPU ops: every kernel's signature, once. A KernelTable is one ISA's set of them; kernels()
// gives the set in use. Mathematics, shapes and dropout are those of fastbert/ops (the reference of
// each op is its definition); here only what the pointers hold is said.
//
//   dtype          activations: fp32, bf16 or fp64
//   vector_dtype   biases, LayerNorm weights and their gradients: dtype or fp32
//   mean rstd lse  fp32 (fp64 when dtype is fp64), which is also the type of all arithmetic
//   num_threads    at most so many; results do not depend on it
//   nullptr        an optional argument that is not given
//
// Arrays are contiguous and every output element is written. Arguments are trusted: callers from
// outside check ids, labels, indices and cu_seqlens first (checks.h).
#pragma once

#include <cstdint>

#include "types.h"

namespace fastbert {

/// A row of `dtype` (fp32 or bf16).
struct StoredRow {
  const void* data;
  DType dtype;
};

/// A part of attention: `queries` queries from `first_query` on, for `heads` heads, of the sequence
/// of `length` tokens that begins at token `start`.
struct AttentionPiece {
  int64_t start, length, first_query, queries, first_head, heads;
};

/// A tensor of a list, as three 64-bit words from Python.
struct ListedTensor {
  const void* data;
  int64_t numel;
  int64_t dtype;  // a DType
};

/// What a step of AdamW reads and writes of one parameter, as ten 64-bit words from Python. All
/// arrays have `numel` elements.
struct AdamWSlot {
  int64_t numel;
  float* param;
  const void* grad;  // of grad_dtype: fp32 or bf16
  int64_t grad_dtype;
  float* exp_avg;
  float* exp_avg_sq;
  bf16* copy;         // of param, rounded; nullptr for none
  const float* step;  // one number, counted from 1
  double lr;
  double weight_decay;
};

struct KernelTable {
  /// qkv (T, 3, N, D), cu_seqlens (B + 1) -> out (T, N, D), lse (N, T).
  void (*attention_fwd)(const void* qkv, const int32_t* cu_seqlens, int64_t num_sequences,
                        int64_t num_tokens, int64_t heads, int64_t head_dim, int64_t max_seqlen,
                        double softmax_scale, double dropout_p, uint64_t seed, uint32_t offset,
                        void* out, void* lse, DType dtype, int num_threads);

  /// dout, out (T, N, D), lse (N, T) -> dqkv (T, 3, N, D).
  void (*attention_bwd)(const void* dout, const void* qkv, const void* out, const void* lse,
                        const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens,
                        int64_t heads, int64_t head_dim, int64_t max_seqlen, double softmax_scale,
                        double dropout_p, uint64_t seed, uint32_t offset, void* dqkv, DType dtype,
                        int num_threads);

  /// x (rows, cols), bias (cols)? -> y (rows, cols).
  void (*bias_gelu_fwd)(const void* x, const void* bias, int64_t rows, int64_t cols, bool tanh,
                        void* y, DType dtype, DType vector_dtype, int num_threads);

  /// dy, x (rows, cols) -> dx (rows, cols), dbias (cols)?.
  void (*bias_gelu_bwd)(const void* dy, const void* x, const void* bias, int64_t rows, int64_t cols,
                        bool tanh, void* dx, void* dbias, DType dtype, DType vector_dtype,
                        int num_threads);

  /// x (rows, cols), residual? alike, x_bias? weight bias (cols) -> y, z? (rows, cols), mean? and
  /// rstd? (rows).
  void (*add_layer_norm_fwd)(const void* x, const void* residual, const void* x_bias,
                             const void* weight, const void* bias, int64_t rows, int64_t cols,
                             double eps, double dropout_p, uint64_t seed, uint32_t offset, void* y,
                             void* z, void* mean, void* rstd, DType dtype, DType vector_dtype,
                             int num_threads);

  /// dy, z (rows, cols) -> dz, dx? (rows, cols), dweight, dbias, dx_bias? (cols). dx is nullptr
  /// when it equals dz (no dropout).
  void (*add_layer_norm_bwd)(const void* dy, const void* z, const void* weight, const void* mean,
                             const void* rstd, int64_t rows, int64_t cols, double dropout_p,
                             uint64_t seed, uint32_t offset, void* dz, void* dx, void* dweight,
                             void* dbias, void* dx_bias, DType dtype, DType vector_dtype,
                             int num_threads);

  /// ids (rows), tables word (vocab, cols), position (positions, cols), token_type (types, cols)?
  /// -> y (rows, cols), mean, rstd (rows). token_type_ids and token_type come together.
  void (*embed_layer_norm_fwd)(const int64_t* input_ids, const int64_t* position_ids,
                               const int64_t* token_type_ids, const void* word,
                               const void* position, const void* token_type, const void* weight,
                               const void* bias, int64_t rows, int64_t cols, int64_t vocab,
                               int64_t positions, int64_t types, double eps, double dropout_p,
                               uint64_t seed, uint32_t offset, void* y, void* mean, void* rstd,
                               DType dtype, DType vector_dtype, int num_threads);

  /// -> dword (vocab, cols), dposition (positions, cols), dtoken_type (types, cols)?, dweight,
  /// dbias (cols). The tables' gradients are dense.
  void (*embed_layer_norm_bwd)(const void* dy, const int64_t* input_ids,
                               const int64_t* position_ids, const int64_t* token_type_ids,
                               const void* word, const void* position, const void* token_type,
                               const void* weight, const void* mean, const void* rstd, int64_t rows,
                               int64_t cols, int64_t vocab, int64_t positions, int64_t types,
                               double dropout_p, uint64_t seed, uint32_t offset, void* dword,
                               void* dposition, void* dtoken_type, void* dweight, void* dbias,
                               DType dtype, DType vector_dtype, int num_threads);

  /// logits (rows, vocab) with row_stride elements between rows, bias (vocab)?, labels (rows) ->
  /// loss (rows) fp32 (fp64 when dtype is fp64). With write_grad, logits become their gradient.
  void (*cross_entropy_rows)(void* logits, int64_t row_stride, const void* bias,
                             const int64_t* labels, int64_t rows, int64_t vocab,
                             int64_t ignore_index, bool write_grad, double grad_scale, void* loss,
                             DType dtype, DType vector_dtype, int num_threads);

  /// x (num_rows, cols), index (count) strictly ascending -> out (count, cols).
  void (*gather_rows)(const void* x, const int64_t* index, int64_t count, int64_t num_rows,
                      int64_t cols, void* out, DType dtype, int num_threads);

  /// x (count, cols), index (count) strictly ascending -> out (num_rows, cols), 0 where no index.
  void (*scatter_rows)(const void* x, const int64_t* index, int64_t count, int64_t num_rows,
                       int64_t cols, void* out, DType dtype, int num_threads);

  /// *sum = the sum of the squares of all elements of `count` tensors.
  void (*squared_norm)(const ListedTensor* tensors, int64_t count, double* sum, int num_threads);

  /// One step of every slot; gradients are divided by grad_scale.
  void (*adamw_step)(const AdamWSlot* slots, int64_t count, double beta1, double beta2, double eps,
                     bool bias_correction, double grad_scale, int num_threads);

  /// x (rows, k), w (columns, k) -> y (rows, columns) = x wᵀ, with ldy elements between its rows.
  /// fp32 or bf16, sums in fp32. For few rows.
  void (*few_rows_product)(const void* x, const void* w, int64_t rows, int64_t k, int64_t columns,
                           void* y, int64_t ldy, DType dtype, int num_threads);

  // What the inference engine cuts its own work into. All fp32, on the calling thread.

  /// y (cols) = the sum of `count` rows, added up in their order.
  void (*sum_rows)(const StoredRow* rows, int64_t count, int64_t cols, float* y);

  /// y (rows, cols) = LayerNorm(z); y may be z.
  void (*layer_norm_rows)(const float* z, const float* weight, const float* bias, int64_t rows,
                          int64_t cols, float eps, float* y);

  /// qkv (T, 3, N, D), scores scaled by 1/√D -> the piece's part of out (T, N, D).
  void (*attention_piece)(const float* qkv, const AttentionPiece& piece, int64_t heads,
                          int64_t head_dim, float* out);
};

/// The table of the ISA in use: the best that this machine has, unless set_isa() chose.
const KernelTable& kernels();

/// Its name, the one that dispatch.h knows: "avx512_vnni", say.
const char* isa();

}  // namespace fastbert
