// What the attention kernels share: their arguments and which part of the work a block has.
#pragma once

#include "philox.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace fastbert::cuda {

constexpr float kLog2E = 1.4426950408889634f;  // exp(x) = 2^(x log2 e)

/// As in attention_fwd() of ops.h.
struct AttentionForward {
  const void* qkv;
  const int32_t* cu_seqlens;
  void* out;
  float* lse;
  int64_t tokens;
  int heads, head_dim;
  int query_tiles;  // blocks a (sequence, head)
  float softmax_scale;
  Dropout dropout;
};

/// The tile of queries, head and sequence of a block. One-dimensional grids take any batch, and
/// blocks that share keys and values are neighbours, whose second reads come from L2.
struct AttentionBlock {
  int tile, head;
  int start;   // first token of the sequence
  int length;  // tokens of the sequence

  __device__ __forceinline__ explicit AttentionBlock(const AttentionForward& p)
      : AttentionBlock(p.cu_seqlens, p.heads, p.query_tiles) {}
  __device__ __forceinline__ AttentionBlock(const int32_t* cu_seqlens, int heads, int tiles) {
    const int block = static_cast<int>(blockIdx.x);
    const int pair = block / tiles;
    const int sequence = pair / heads;
    tile = block - pair * tiles;
    head = pair - sequence * heads;
    start = cu_seqlens[sequence];
    length = cu_seqlens[sequence + 1] - start;
  }

  /// The block's query, key and value vectors: (length, head_dim) each, `row_stride` apart.
  template <typename T, typename Arguments>
  __device__ __forceinline__ const T* input(const Arguments& p, int which) const {
    const int64_t row = static_cast<int64_t>(start) * 3 + which;
    return static_cast<const T*>(p.qkv) + (row * p.heads + head) * p.head_dim;
  }
  template <typename Arguments>
  __device__ __forceinline__ static int64_t row_stride(const Arguments& p) {
    return static_cast<int64_t>(3) * p.heads * p.head_dim;
  }

  /// The output vector of query `query` of the sequence; the next one's is `output_stride` on.
  template <typename T>
  __device__ __forceinline__ T* output(const AttentionForward& p, int query) const {
    const int64_t row = static_cast<int64_t>(start + query);
    return static_cast<T*>(p.out) + (row * p.heads + head) * p.head_dim;
  }
  __device__ __forceinline__ static int64_t output_stride(const AttentionForward& p) {
    return static_cast<int64_t>(p.heads) * p.head_dim;
  }
  __device__ __forceinline__ float* lse(const AttentionForward& p, int query) const {
    return p.lse + head * p.tokens + start + query;
  }
};

}  // namespace fastbert::cuda
