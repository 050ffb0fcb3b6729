// What the LayerNorm kernels share: one warp a row, which stays in registers if it fits.
#pragma once

#include <algorithm>

#include "reduce.cuh"
#include "vector.cuh"

namespace fastbert::cuda {

constexpr int kRowWarps = 4;  // warps of a block, one row each
inline const dim3 kRowBlock(kWarpSize, kRowWarps);

// Bounds on registers, 128 and 255: left to itself ptxas spills a few for an occupancy without use
// here.
constexpr int kForwardBlocksPerSM = 4;
constexpr int kBackwardBlocksPerSM = 2;

/// Lane l owns kVectors vectors of its row: those of columns (v · 32 + l) · kWidth.
template <typename T, int kPerLane>
struct RowLayout {
  static constexpr int kWidth = kVectorWidth<T>;
  static constexpr int kVectors = kPerLane / kWidth;

  __device__ __forceinline__ static int col(int vector) {
    return (vector * kWarpSize + static_cast<int>(threadIdx.x)) * kWidth;
  }
};

/// A row, or sums over rows, in the registers of a warp.
template <typename T, int kPerLane>
using RowValues = float[kPerLane / kVectorWidth<T>][kVectorWidth<T>];

/// Calls body(Type<T>, elements a lane) for a row that fits a warp's registers, else
/// wide(Type<T>, vector width).
template <typename Body, typename Wide>
void with_layout(int dtype, int64_t cols, bool aligned, const char* op, Body&& body, Wide&& wide) {
  with_type(dtype, op, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!aligned || cols % kVectorWidth<T> != 0) {
      wide(type, std::integral_constant<int, 1>{});
    } else if (cols <= 8 * kWarpSize) {
      body(type, std::integral_constant<int, 8>{});
    } else if (cols <= 16 * kWarpSize) {
      body(type, std::integral_constant<int, 16>{});
    } else if (cols <= 24 * kWarpSize) {
      body(type, std::integral_constant<int, 24>{});
    } else if (cols <= 32 * kWarpSize) {
      body(type, std::integral_constant<int, 32>{});
    } else {
      wide(type, std::integral_constant<int, kVectorWidth<T>>{});
    }
  });
}

/// Groups of rows in backward, one block each: at least 8 rows a warp, to make the 3 · cols floats
/// that a group writes worth it, and at most a few waves of any GPU. A function of the shape alone,
/// for it fixes the order of the sums.
inline int64_t backward_groups(int64_t rows) {
  return std::clamp<int64_t>(ceil_div<int64_t>(rows, 8 * kRowWarps), 1, 512);
}

/// The mean of a row and 1 / sqrt(variance + eps), in every lane.
struct RowStatistics {
  float mean, rstd;

  /// By the first lane of the row's warp, where the caller keeps them.
  __device__ __forceinline__ void save(float* means, float* rstds, int64_t row) const {
    if (means != nullptr && threadIdx.x == 0) {
      means[row] = mean;
      rstds[row] = rstd;
    }
  }
};

/// Of the row z, its variance in a second pass over the registers.
template <typename T, int kPerLane>
__device__ __forceinline__ RowStatistics row_statistics(const RowValues<T, kPerLane>& z, int cols,
                                                        float eps) {
  using Layout = RowLayout<T, kPerLane>;
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    if (Layout::col(v) < cols) {
#pragma unroll
      for (int i = 0; i < Layout::kWidth; ++i) sum += z[v][i];
    }
  }
  const float mean = warp_sum(sum) / static_cast<float>(cols);

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    if (Layout::col(v) < cols) {
#pragma unroll
      for (int i = 0; i < Layout::kWidth; ++i) squares += (z[v][i] - mean) * (z[v][i] - mean);
    }
  }
  return {mean, 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(cols) + eps)};
}

/// values, z's columns col …, become (z − mean) · rstd · weight + bias.
template <typename T, int kWidth>
__device__ __forceinline__ void normalize(const Parameter& weight, const Parameter& bias,
                                          int64_t col, const RowStatistics& of,
                                          float (&values)[kWidth]) {
  float w[kWidth], b[kWidth];
  weight.load<T, kWidth>(col, w);
  bias.load<T, kWidth>(col, b);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = (values[i] - of.mean) * of.rstd * w[i] + b[i];
}

/// Turns g, the row's dy, into dz, and adds the row's shares of dweight and dbias. With
/// n = (z − mean) · rstd and g = dy · weight: dz = rstd (g − E g − n E(g n)). Overwrites z.
template <typename T, int kPerLane>
__device__ __forceinline__ void row_gradient(const Parameter& weight, int cols,
                                             const RowStatistics& of, RowValues<T, kPerLane>& g,
                                             RowValues<T, kPerLane>& z,
                                             RowValues<T, kPerLane>& dweight,
                                             RowValues<T, kPerLane>& dbias) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth;
  auto& n = z;
  float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    if (Layout::col(v) < cols) {
      float w[kWidth];
      weight.load<T, kWidth>(Layout::col(v), w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        n[v][i] = (z[v][i] - of.mean) * of.rstd;
        dweight[v][i] += g[v][i] * n[v][i];
        dbias[v][i] += g[v][i];
        g[v][i] *= w[i];
        sum_g += g[v][i];
        sum_gn += g[v][i] * n[v][i];
      }
    }
  }
  const float inverse_cols = 1.0f / static_cast<float>(cols);
  const float mean_g = warp_sum(sum_g) * inverse_cols;
  const float mean_gn = warp_sum(sum_gn) * inverse_cols;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g[v][i] = of.rstd * (g[v][i] - mean_g - n[v][i] * mean_gn);
    }
  }
}

/// The same gradient of a row that does not fit: load(col, g, n) brings g = dy · weight and n of
/// kWidth columns, twice; store(col, dz) takes the result.
template <int kWidth, typename Load, typename Store>
__device__ __forceinline__ void wide_row_gradient(int64_t cols, float rstd, Load&& load,
                                                  Store&& store) {
  constexpr int kStep = kWarpSize * kWidth;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  float sum_g = 0.0f, sum_gn = 0.0f;
  for (int64_t col = first; col < cols; col += kStep) {
    float g[kWidth], n[kWidth];
    load(col, g, n);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum_g += g[i];
      sum_gn += g[i] * n[i];
    }
  }
  const float mean_g = warp_sum(sum_g) / static_cast<float>(cols);
  const float mean_gn = warp_sum(sum_gn) / static_cast<float>(cols);
  for (int64_t col = first; col < cols; col += kStep) {
    float g[kWidth], n[kWidth];
    load(col, g, n);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
    store(col, g);
  }
}

/// Adds each warp's sums of its columns in order and writes them as the group's row of `partial`.
/// Called by the whole block.
template <typename T, int kPerLane>
__device__ __forceinline__ void sum_row_warps(const RowValues<T, kPerLane>& sums, float* partial,
                                              int cols) {
  using Layout = RowLayout<T, kPerLane>;
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());  // (kRowWarps, cols)
  __syncthreads();  // the previous call's readers are done
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    if (Layout::col(v) < cols) {
#pragma unroll
      for (int i = 0; i < Layout::kWidth; i += 4) {
        *reinterpret_cast<float4*>(shared + threadIdx.y * cols + Layout::col(v) + i) =
            make_float4(sums[v][i], sums[v][i + 1], sums[v][i + 2], sums[v][i + 3]);
      }
    }
  }
  __syncthreads();
  for (int col = threadIdx.y * kWarpSize + threadIdx.x; col < cols; col += kRowWarps * kWarpSize) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kRowWarps; ++warp) total += shared[warp * cols + col];
    partial[col] = total;
  }
}

/// Bytes of shared memory that sum_row_warps() uses.
inline size_t row_shared_bytes(int64_t cols) { return sizeof(float) * kRowWarps * cols; }

}  // namespace fastbert::cuda
