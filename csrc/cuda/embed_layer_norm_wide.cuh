// What the embed_layer_norm kernels share, and the kernels for rows that do not fit a warp's
// registers or whose addresses are not multiples of 16 bytes. These gather the embeddings anew in
// each pass; kWidth is the number of elements in 16 bytes, or 1.
#pragma once

#include "layer_norm.cuh"
#include "philox.cuh"

namespace fastbert::cuda {

/// A table (entries, cols) and each token's row of it; both null: there is none.
struct Embedding {
  const int64_t* ids;
  const void* table;
  int64_t entries;

  /// The row of `token`, an id outside the table taking the nearest one; null without a table.
  template <typename T>
  __device__ __forceinline__ const T* row(int64_t token, int64_t cols) const {
    if (table == nullptr) return nullptr;
    const int64_t id = min(max(ids[token], int64_t{0}), entries - 1);
    return static_cast<const T*>(table) + id * cols;
  }
};

/// The rows whose sum e a token normalizes.
template <typename T>
struct EmbeddingRows {
  const T *word, *position, *token_type;

  /// Columns col … of e, which is never stored: each pass and backward add it up in one order.
  template <int kWidth>
  __device__ __forceinline__ void load(int64_t col, float (&e)[kWidth]) const {
    Packed<T, kWidth> first, second;
    first.load_read_only(word + col);
    second.load_read_only(position + col);
    first.unpack(e);
    add<kWidth>(second, col, e);
  }

  /// e, which holds word's columns col …, becomes (word + position) + token_type.
  template <int kWidth>
  __device__ __forceinline__ void add(const Packed<T, kWidth>& packed_position, int64_t col,
                                      float (&e)[kWidth]) const {
    float other[kWidth];
    packed_position.unpack(other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) e[i] += other[i];
    if (token_type == nullptr) return;
    // A few rows, which every token shares: they stay in L1.
    Packed<T, kWidth> packed;
    packed.load_read_only(token_type + col);
    packed.unpack(other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) e[i] += other[i];
  }
};

struct Embeddings {
  Embedding word, position, token_type;

  template <typename T>
  __device__ __forceinline__ EmbeddingRows<T> rows(int64_t token, int64_t cols) const {
    return {word.row<T>(token, cols), position.row<T>(token, cols), token_type.row<T>(token, cols)};
  }
};

/// As in embed_layer_norm_fwd() of ops.h.
struct EmbedForward {
  Embeddings embeddings;
  Parameter weight, bias;
  void* y;
  float *mean, *rstd;
  int64_t tokens, cols;
  float eps;
  Dropout dropout;
};

/// As in embed_layer_norm_bwd() of ops.h.
struct EmbedBackward {
  const void* dy;
  Embeddings embeddings;
  Parameter weight;
  const float *mean, *rstd;
  void* de;
  float* partials;  // (2, groups, cols): dweight, dbias
  int64_t groups, tokens, cols;
  Dropout dropout;

  /// The partial sums of vector 0 or 1 that group `group` writes.
  __device__ __forceinline__ float* partial(int vector, int64_t group) const {
    return partials + (vector * groups + group) * cols;
  }
};

/// values · dropout, where there is one.
template <int kWidth>
__device__ __forceinline__ void drop(const Philox& philox, const Dropout& dropout, int64_t token,
                                     int64_t col, float (&values)[kWidth]) {
  if (!dropout.active) return;
  drop_hidden<kWidth>(philox, dropout, static_cast<uint32_t>(token), static_cast<uint32_t>(col),
                      values);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kForwardBlocksPerSM)
    embed_layer_norm_wide_fwd_kernel(const EmbedForward p) {
  constexpr int kStep = kWarpSize * kWidth;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (token >= p.tokens) return;  // a whole warp
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const EmbeddingRows<T> rows = p.embeddings.rows<T>(token, p.cols);

  float sum = 0.0f;
  for (int64_t col = first; col < p.cols; col += kStep) {
    float e[kWidth];
    rows.load(col, e);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += e[i];
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.cols);

  float squares = 0.0f;
  for (int64_t col = first; col < p.cols; col += kStep) {
    float e[kWidth];
    rows.load(col, e);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += (e[i] - mean) * (e[i] - mean);
  }
  const float variance = warp_sum(squares) / static_cast<float>(p.cols);
  const RowStatistics statistics{mean, 1.0f / sqrtf(variance + p.eps)};
  statistics.save(p.mean, p.rstd, token);

  const Philox philox(p.dropout);
  for (int64_t col = first; col < p.cols; col += kStep) {
    float e[kWidth];
    rows.load(col, e);
    normalize<T, kWidth>(p.weight, p.bias, col, statistics, e);
    drop<kWidth>(philox, p.dropout, token, col, e);
    store<T, kWidth>(static_cast<T*>(p.y) + token * p.cols + col, e);
  }
}

/// de, one warp a token; the sums over tokens come from embed_layer_norm_wide_sums_kernel.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kForwardBlocksPerSM)
    embed_layer_norm_wide_bwd_kernel(const EmbedBackward p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (token >= p.tokens) return;  // a whole warp
  const int64_t offset = token * p.cols;
  const float mean = p.mean[token], rstd = p.rstd[token];
  const EmbeddingRows<T> rows = p.embeddings.rows<T>(token, p.cols);
  const Philox philox(p.dropout);

  const auto load_g_n = [&](int64_t col, float (&g)[kWidth], float (&n)[kWidth]) {
    float weight[kWidth];
    load<T, kWidth>(static_cast<const T*>(p.dy) + offset + col, g);
    rows.load(col, n);
    p.weight.load<T, kWidth>(col, weight);
    drop<kWidth>(philox, p.dropout, token, col, g);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g[i] *= weight[i];
      n[i] = (n[i] - mean) * rstd;
    }
  };
  wide_row_gradient<kWidth>(p.cols, rstd, load_g_n, [&](int64_t col, const float (&de)[kWidth]) {
    store<T, kWidth>(static_cast<T*>(p.de) + offset + col, de);
  });
}

/// Partial sums of dweight and dbias: a lane owns kWidth columns and walks down the tokens of its
/// group, grid (column blocks, groups).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kColumnWarps)
    embed_layer_norm_wide_sums_kernel(const EmbedBackward p) {
  const int64_t group = blockIdx.y;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * kWidth;
  const Philox philox(p.dropout);
  float dweight[kWidth] = {}, dbias[kWidth] = {};
  if (col < p.cols) {
    for (int64_t token = group * kColumnWarps + threadIdx.y; token < p.tokens;
         token += p.groups * kColumnWarps) {
      const float mean = p.mean[token], rstd = p.rstd[token];
      float dy[kWidth], e[kWidth];
      load<T, kWidth>(static_cast<const T*>(p.dy) + token * p.cols + col, dy);
      p.embeddings.rows<T>(token, p.cols).load(col, e);
      drop<kWidth>(philox, p.dropout, token, col, dy);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        dweight[i] += dy[i] * (e[i] - mean) * rstd;
        dbias[i] += dy[i];
      }
    }
  }
  sum_column_warps<kWidth>(dweight, p.partial(0, group), col, p.cols);
  sum_column_warps<kWidth>(dbias, p.partial(1, group), col, p.cols);
}

}  // namespace fastbert::cuda
