// Attention backward for fp32 and for any head dimension and alignment: one warp a query for dQ,
// then one warp a key for dK and dV, in plain arithmetic. Correct everywhere, fast nowhere.
#pragma once

#include "attention_bwd.cuh"

namespace fastbert::cuda {

/// Shared memory of a warp: four rows in fp32 (its two vectors, its two sums), and p and ds of 32
/// pairs.
constexpr int64_t attention_bwd_any_warp_bytes(int64_t head_dim) {
  return static_cast<int64_t>(sizeof(float)) * (4 * head_dim + 2 * kWarpSize);
}

/// A warp's part of shared memory.
struct AnyWarpMemory {
  float *first, *second, *first_sum, *second_sum, *probabilities, *score_gradients;

  __device__ __forceinline__ explicit AnyWarpMemory(int head_dim) {
    first = reinterpret_cast<float*>(dynamic_shared_memory() +
                                     threadIdx.y * attention_bwd_any_warp_bytes(head_dim));
    second = first + head_dim;
    first_sum = second + head_dim;
    second_sum = first_sum + head_dim;
    probabilities = second_sum + head_dim;
    score_gradients = probabilities + kWarpSize;
  }
};

template <typename T>
__device__ __forceinline__ float dot(const float* a, const T* b, int head_dim) {
  float sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) sum += a[d] * to_float(b[d]);
  return sum;
}

/// 1 / (1 − p) where the probability of (query, key) is kept, else 0.
__device__ __forceinline__ float dropout_factor(const AttentionBackward& p, const Philox& philox,
                                                int query_token, int key, int head) {
  if (!p.dropout.active) return 1.0f;
  return philox.word(key, query_token, head) >= p.dropout.threshold ? p.dropout.scale : 0.0f;
}

/// dq_i = scale Σ_j ds_ij k_j, and delta_i: lanes take a key each for ds, every 32nd dimension for
/// the sum.
template <typename T>
__global__ void attention_bwd_any_queries_kernel(const AttentionBackward p) {
  const AttentionBackwardBlock block(p);
  const int lane = threadIdx.x, head_dim = p.head_dim;
  const int query = block.tile * static_cast<int>(blockDim.y) + threadIdx.y;
  if (query >= block.length) return;  // a whole warp; no barrier below spans the block
  const int64_t stride = AttentionBlock::row_stride(p);
  const int64_t out_row = query * AttentionBackwardBlock::out_stride(p);
  const T* queries = block.input<T>(p, 0) + query * stride;
  const T* keys = block.input<T>(p, 1);
  const T* values = block.input<T>(p, 2);
  const T* douts = block.output<T>(p, p.dout) + out_row;
  const T* outs = block.output<T>(p, p.out) + out_row;
  const Philox philox(p.dropout);

  const AnyWarpMemory memory(head_dim);
  float* const q = memory.first;
  float* const dout = memory.second;
  float* const dq = memory.first_sum;
  float delta = 0.0f;
  for (int d = lane; d < head_dim; d += kWarpSize) {
    q[d] = to_float(queries[d]);
    dout[d] = to_float(douts[d]);
    dq[d] = 0.0f;
    delta += dout[d] * to_float(outs[d]);
  }
  delta = warp_sum(delta);
  const float lse = p.lse[block.statistics(p) + query];
  if (lane == 0) p.delta[block.statistics(p) + query] = delta;
  __syncwarp();

  for (int first = 0; first < block.length; first += kWarpSize) {
    const int key = first + lane;
    float ds = 0.0f;
    if (key < block.length) {
      const float score = dot(q, keys + key * stride, head_dim) * p.softmax_scale;
      const float dp = dot(dout, values + key * stride, head_dim) *
                       dropout_factor(p, philox, block.start + query, key, block.head);
      ds = expf(score - lse) * (dp - delta);
    }
    memory.score_gradients[lane] = ds;
    __syncwarp();
    const int keys_here = min(kWarpSize, block.length - first);
    for (int d = lane; d < head_dim; d += kWarpSize) {
      const T* k = keys + first * stride + d;
      for (int j = 0; j < keys_here; ++j) {
        dq[d] += memory.score_gradients[j] * to_float(k[j * stride]);
      }
    }
    __syncwarp();  // before the next keys' ds replace these
  }
  T* to = block.gradient<T>(p, 0) + query * stride;
  for (int d = lane; d < head_dim; d += kWarpSize) to[d] = from_float<T>(dq[d] * p.softmax_scale);
}

/// dk_j = scale Σ_i ds_ij q_i and dv_j = Σ_i dropout(p_ij) dout_i: lanes take a query each for p and
/// ds, every 32nd dimension for the sums.
template <typename T>
__global__ void attention_bwd_any_keys_kernel(const AttentionBackward p) {
  const AttentionBackwardBlock block(p);
  const int lane = threadIdx.x, head_dim = p.head_dim;
  const int key = block.tile * static_cast<int>(blockDim.y) + threadIdx.y;
  if (key >= block.length) return;  // a whole warp; no barrier below spans the block
  const int64_t stride = AttentionBlock::row_stride(p);
  const int64_t out_stride = AttentionBackwardBlock::out_stride(p);
  const T* queries = block.input<T>(p, 0);
  const T* keys = block.input<T>(p, 1) + key * stride;
  const T* values = block.input<T>(p, 2) + key * stride;
  const T* douts = block.output<T>(p, p.dout);
  const Philox philox(p.dropout);

  const AnyWarpMemory memory(head_dim);
  float* const k = memory.first;
  float* const v = memory.second;
  float* const dk = memory.first_sum;
  float* const dv = memory.second_sum;
  for (int d = lane; d < head_dim; d += kWarpSize) {
    k[d] = to_float(keys[d]);
    v[d] = to_float(values[d]);
    dk[d] = 0.0f;
    dv[d] = 0.0f;
  }
  __syncwarp();

  for (int first = 0; first < block.length; first += kWarpSize) {
    const int query = first + lane;
    float probability = 0.0f, ds = 0.0f;
    if (query < block.length) {
      const int64_t at = block.statistics(p) + query;
      const float score = dot(k, queries + query * stride, head_dim) * p.softmax_scale;
      const float factor = dropout_factor(p, philox, block.start + query, key, block.head);
      const float dp = dot(v, douts + query * out_stride, head_dim) * factor;
      probability = expf(score - p.lse[at]);
      ds = probability * (dp - p.delta[at]);
      probability *= factor;
    }
    memory.probabilities[lane] = probability;
    memory.score_gradients[lane] = ds;
    __syncwarp();
    const int queries_here = min(kWarpSize, block.length - first);
    for (int d = lane; d < head_dim; d += kWarpSize) {
      const T* q = queries + first * stride + d;
      const T* dout = douts + first * out_stride + d;
      for (int i = 0; i < queries_here; ++i) {
        dk[d] += memory.score_gradients[i] * to_float(q[i * stride]);
        dv[d] += memory.probabilities[i] * to_float(dout[i * out_stride]);
      }
    }
    __syncwarp();  // before the next queries' p and ds replace these
  }
  T* to_k = block.gradient<T>(p, 1) + key * stride;
  T* to_v = block.gradient<T>(p, 2) + key * stride;
  for (int d = lane; d < head_dim; d += kWarpSize) {
    to_k[d] = from_float<T>(dk[d] * p.softmax_scale);
    to_v[d] = from_float<T>(dv[d]);
  }
}

}  // namespace fastbert::cuda
