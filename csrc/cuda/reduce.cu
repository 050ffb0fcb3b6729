#include "reduce.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kSumWarps = 16;

/// One column a lane; each warp adds every kSumWarps-th group, then the first warp adds the warps.
__global__ void __launch_bounds__(kWarpSize* kSumWarps)
    sum_groups_kernel(const float* __restrict__ partials, GroupSums sums, int groups,
                      int64_t cols) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  // Selected without indexing: an index known only at run time would put the array in local memory.
  void* out = blockIdx.y == 0 ? sums.out[0] : blockIdx.y == 1 ? sums.out[1] : sums.out[2];
  if (out == nullptr) return;

  float total = 0.0f;
  if (col < cols) {
    const float* column = partials + static_cast<int64_t>(blockIdx.y) * groups * cols + col;
    for (int group = warp; group < groups; group += kSumWarps) total += column[group * cols];
  }
  shared[warp * kWarpSize + lane] = total;
  __syncthreads();
  if (warp != 0 || col >= cols) return;
#pragma unroll
  for (int other = 1; other < kSumWarps; ++other) total += shared[other * kWarpSize + lane];
  switch (sums.dtype) {
    case kFloat32:
      static_cast<float*>(out)[col] = total;
      break;
    case kBFloat16:
      static_cast<bf16*>(out)[col] = from_float<bf16>(total);
      break;
    default:
      static_cast<fp16*>(out)[col] = from_float<fp16>(total);
      break;
  }
}

}  // namespace

void sum_groups(const float* partials, GroupSums sums, int64_t groups, int64_t cols, const char* op,
                cudaStream_t stream) {
  unsigned vectors = GroupSums::kMax;
  while (vectors > 1 && sums.out[vectors - 1] == nullptr) --vectors;
  const dim3 grid(grid_extent(ceil_div<int64_t>(cols, kWarpSize), op), vectors);
  launch(op, sum_groups_kernel, grid, dim3(kWarpSize, kSumWarps),
         sizeof(float) * kSumWarps * kWarpSize, stream, partials, sums, static_cast<int>(groups),
         cols);
}

}  // namespace fastbert::cuda
