// Attention forward for fp32 and for any head dimension, alignment and scale: one warp a query, in
// plain arithmetic. Correct everywhere, fast nowhere.
#pragma once

#include "attention.cuh"

namespace fastbert::cuda {

/// Shared memory of a warp: the query and the output row, fp32, and the probabilities of 32 keys.
constexpr int64_t attention_any_warp_bytes(int64_t head_dim) {
  return static_cast<int64_t>(sizeof(float)) * (2 * head_dim + kWarpSize);
}

/// Online softmax over 32 keys at a time: for scores each lane takes a key, for the output each
/// lane takes every 32nd dimension.
template <typename T>
__global__ void attention_fwd_any_kernel(const AttentionForward p) {
  const AttentionBlock block(p);
  const int lane = threadIdx.x;
  const int query = block.tile * static_cast<int>(blockDim.y) + threadIdx.y;
  if (query >= block.length) return;  // a whole warp; no barrier below spans the block
  const int head_dim = p.head_dim;
  const int64_t stride = AttentionBlock::row_stride(p);
  const T* queries = block.input<T>(p, 0) + query * stride;
  const T* keys = block.input<T>(p, 1);
  const T* values = block.input<T>(p, 2);
  const Philox philox(p.dropout);

  float* q = reinterpret_cast<float*>(dynamic_shared_memory() +
                                      threadIdx.y * attention_any_warp_bytes(head_dim));
  float* out = q + head_dim;
  float* probabilities = out + head_dim;
  for (int d = lane; d < head_dim; d += kWarpSize) {
    q[d] = to_float(queries[d]);
    out[d] = 0.0f;
  }
  __syncwarp();

  float maximum = -INFINITY, sum = 0.0f;
  for (int first = 0; first < block.length; first += kWarpSize) {
    const int key = first + lane;
    float score = -INFINITY;
    if (key < block.length) {
      const T* k = keys + key * stride;
      float dot = 0.0f;
      for (int d = 0; d < head_dim; ++d) dot += q[d] * to_float(k[d]);
      score = dot * p.softmax_scale;
    }
    const float new_maximum = fmaxf(maximum, warp_max(score));
    const float rescale = expf(maximum - new_maximum);  // 0 the first time
    const float probability = expf(score - new_maximum);
    sum = sum * rescale + warp_sum(probability);
    maximum = new_maximum;
    bool keep = true;
    if (p.dropout.active) {
      keep = philox.word(key, block.start + query, block.head) >= p.dropout.threshold;
    }
    probabilities[lane] = keep ? probability : 0.0f;
    __syncwarp();

    const int keys_here = min(kWarpSize, block.length - first);
    for (int d = lane; d < head_dim; d += kWarpSize) {
      float total = out[d] * rescale;
      const T* v = values + first * stride + d;
      for (int j = 0; j < keys_here; ++j) total += probabilities[j] * to_float(v[j * stride]);
      out[d] = total;
    }
    __syncwarp();  // before the next keys' probabilities replace these
  }

  const float scale = p.dropout.scale / sum;  // 1 / (1 − p), or 1 without dropout
  T* to = block.output<T>(p, query);
  for (int d = lane; d < head_dim; d += kWarpSize) to[d] = from_float<T>(out[d] * scale);
  if (lane == 0) *block.lse(p, query) = maximum + logf(sum);
}

}  // namespace fastbert::cuda
