// What the add_layer_norm kernels share, and the kernels for rows that do not fit a warp's
// registers or whose addresses are not multiples of 16 bytes. These pass over a row several times;
// kWidth is the number of elements in 16 bytes, or 1.
#pragma once

#include "layer_norm.cuh"
#include "philox.cuh"

namespace fastbert::cuda {

/// As in add_layer_norm_fwd() of ops.h.
struct LayerNormForward {
  const void *x, *residual;
  Parameter x_bias, weight, bias;
  void *y, *z;
  float *mean, *rstd;
  int64_t rows, cols;
  float eps;
  Dropout dropout;
};

/// As in add_layer_norm_bwd() of ops.h.
struct LayerNormBackward {
  const void *dy, *z;
  Parameter weight;
  const float *mean, *rstd;
  void *dz, *dx;
  float* partials;  // (3, groups, cols): dweight, dbias, dx_bias
  int64_t groups, rows, cols;
  bool need_x_bias;
  Dropout dropout;

  /// The partial sums of vector 0, 1 or 2 that group `group` writes.
  __device__ __forceinline__ float* partial(int vector, int64_t group) const {
    return partials + (vector * groups + group) * cols;
  }
};

/// values, x's columns col … col + kWidth − 1 of `row`, become z = residual + dropout(x + x_bias),
/// rounded to T so that backward, which reads the stored z, sees the numbers of the statistics.
template <typename T, int kWidth>
__device__ __forceinline__ void add_residual(const LayerNormForward& p, const Philox& philox,
                                             int64_t row, int64_t col,
                                             const float (&residual)[kWidth],
                                             float (&values)[kWidth]) {
  if (p.x_bias.data != nullptr) {
    float bias[kWidth];
    p.x_bias.load<T, kWidth>(col, bias);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] += bias[i];
  }
  if (p.dropout.active) {
    drop_hidden<kWidth>(philox, p.dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(col),
                        values);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = rounded<T>(values[i] + residual[i]);
}

/// z is kept in y's place between the passes: both are T, and each lane reads only what it wrote.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kRowWarps)
    add_layer_norm_wide_fwd_kernel(const LayerNormForward p) {
  constexpr int kStep = kWarpSize * kWidth;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= p.rows) return;  // a whole warp
  const int64_t offset = row * p.cols;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  T* y = static_cast<T*>(p.y) + offset;
  const Philox philox(p.dropout);

  float sum = 0.0f;
  for (int64_t col = first; col < p.cols; col += kStep) {
    float z[kWidth], residual[kWidth] = {};
    load<T, kWidth>(static_cast<const T*>(p.x) + offset + col, z);
    if (p.residual != nullptr) {
      load<T, kWidth>(static_cast<const T*>(p.residual) + offset + col, residual);
    }
    add_residual<T, kWidth>(p, philox, row, col, residual, z);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += z[i];
    store<T, kWidth>(y + col, z);
    if (p.z != nullptr) store<T, kWidth>(static_cast<T*>(p.z) + offset + col, z);
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.cols);

  float squares = 0.0f;
  for (int64_t col = first; col < p.cols; col += kStep) {
    float z[kWidth];
    load<T, kWidth>(y + col, z);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += (z[i] - mean) * (z[i] - mean);
  }
  const float variance = warp_sum(squares) / static_cast<float>(p.cols);
  const RowStatistics statistics{mean, 1.0f / sqrtf(variance + p.eps)};
  statistics.save(p.mean, p.rstd, row);

  for (int64_t col = first; col < p.cols; col += kStep) {
    float z[kWidth];
    load<T, kWidth>(y + col, z);
    normalize<T, kWidth>(p.weight, p.bias, col, statistics, z);
    store<T, kWidth>(y + col, z);
  }
}

/// dz and dx, one warp a row; the sums over rows come from add_layer_norm_wide_sums_kernel.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kRowWarps)
    add_layer_norm_wide_bwd_kernel(const LayerNormBackward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= p.rows) return;  // a whole warp
  const int64_t offset = row * p.cols;
  const float mean = p.mean[row], rstd = p.rstd[row];
  const Philox philox(p.dropout);

  const auto load_g_n = [&](int64_t col, float (&g)[kWidth], float (&n)[kWidth]) {
    float weight[kWidth];
    load<T, kWidth>(static_cast<const T*>(p.dy) + offset + col, g);
    load<T, kWidth>(static_cast<const T*>(p.z) + offset + col, n);
    p.weight.load<T, kWidth>(col, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g[i] *= weight[i];
      n[i] = (n[i] - mean) * rstd;
    }
  };
  wide_row_gradient<kWidth>(p.cols, rstd, load_g_n, [&](int64_t col, float (&dz)[kWidth]) {
    store<T, kWidth>(static_cast<T*>(p.dz) + offset + col, dz);
    if (p.dropout.active) {
      drop_hidden<kWidth>(philox, p.dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(col),
                          dz);
      store<T, kWidth>(static_cast<T*>(p.dx) + offset + col, dz);
    }
  });
}

/// Partial sums of dweight, dbias and dx_bias: a lane owns kWidth columns and walks down the rows
/// of its group, grid (column blocks, groups).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kColumnWarps)
    add_layer_norm_wide_sums_kernel(const LayerNormBackward p) {
  const int64_t group = blockIdx.y;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * kWidth;
  const T* dx = static_cast<const T*>(p.dropout.active ? p.dx : p.dz);
  float dweight[kWidth] = {}, dbias[kWidth] = {}, dx_bias[kWidth] = {};
  if (col < p.cols) {
    for (int64_t row = group * kColumnWarps + threadIdx.y; row < p.rows;
         row += p.groups * kColumnWarps) {
      const int64_t at = row * p.cols + col;
      const float mean = p.mean[row], rstd = p.rstd[row];
      float dy[kWidth], z[kWidth];
      load<T, kWidth>(static_cast<const T*>(p.dy) + at, dy);
      load<T, kWidth>(static_cast<const T*>(p.z) + at, z);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        dweight[i] += dy[i] * (z[i] - mean) * rstd;
        dbias[i] += dy[i];
      }
      if (p.need_x_bias) {
        float dropped[kWidth];
        load<T, kWidth>(dx + at, dropped);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dx_bias[i] += dropped[i];
      }
    }
  }
  sum_column_warps<kWidth>(dweight, p.partial(0, group), col, p.cols);
  sum_column_warps<kWidth>(dbias, p.partial(1, group), col, p.cols);
  if (p.need_x_bias) sum_column_warps<kWidth>(dx_bias, p.partial(2, group), col, p.cols);
}

}  // namespace fastbert::cuda
