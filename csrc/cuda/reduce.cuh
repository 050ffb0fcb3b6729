// Sums and maxima across a warp; sums over rows in a fixed order.
#pragma once

#include "primitives.cuh"
#include "types.cuh"

namespace fastbert::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

/// The same total in every lane: the butterfly adds the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// Gradients of bias and LayerNorm vectors are sums over all rows. Float atomics would add them in a
// different order each run, so they go in two steps of fixed order: the grid's rows of blocks
// ("groups", a number that depends on the shape alone) each write one row of partial sums, (groups,
// cols) fp32, and sum_groups() adds the groups.

/// A block that owns kWidth columns a lane and shares its rows among kColumnWarps warps.
constexpr int kColumnWarps = 8;

/// Bytes of shared memory that sum_column_warps() uses.
template <int kWidth>
constexpr size_t kColumnSharedBytes = sizeof(float) * kWidth * kColumnWarps * kWarpSize;

/// Adds `sums` of the block's warps and writes them to `row`, for partial sums the group's, at
/// columns `col` … `col + kWidth − 1` of this lane (not those past `cols`). Called by the whole
/// block.
template <int kWidth, typename T>
__device__ __forceinline__ void sum_column_warps(const float (&sums)[kWidth], T* row, int64_t col,
                                                 int64_t cols) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int lane = threadIdx.x, warp = threadIdx.y;
  __syncthreads();  // the previous call's readers are done
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    shared[(i * kColumnWarps + warp) * kWarpSize + lane] = sums[i];
  }
  __syncthreads();
  static_assert(kWidth <= kColumnWarps, "warp i adds the lanes' i-th columns");
  if (warp >= kWidth || col >= cols) return;
  float total = 0.0f;
#pragma unroll
  for (int other = 0; other < kColumnWarps; ++other) {
    total += shared[(warp * kColumnWarps + other) * kWarpSize + lane];
  }
  row[col + warp] = from_float<T>(total);
}

/// Up to three vectors summed by one launch.
struct GroupSums {
  static constexpr int kMax = 3;
  void* out[kMax];  // (cols) of the dtype below; null: that vector is not wanted
  int dtype;
};

/// out[v][col] = Σ_group partials[(v · groups + group) · cols + col], in order.
void sum_groups(const float* partials, GroupSums sums, int64_t groups, int64_t cols, const char* op,
                cudaStream_t stream);

}  // namespace fastbert::cuda
