// y = LayerNorm(residual + dropout(x + x_bias)) and its gradients: one warp a row.
//
// Rows of up to 1024 columns stay in the warp's registers, loaded once in 16-byte vectors (768 bf16
// are three a lane); see add_layer_norm_wide.cuh for other widths and for pointers off 16-byte
// boundaries.
#include <algorithm>

#include "add_layer_norm_wide.cuh"

namespace fastbert::cuda {
namespace {

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

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kForwardBlocksPerSM)
    add_layer_norm_fwd_kernel(const LayerNormForward p) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth, kVectors = Layout::kVectors;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= p.rows) return;  // a whole warp
  const int cols = static_cast<int>(p.cols);
  const int64_t offset = row * p.cols;

  // All loads first, still packed, so that they are in flight together.
  Packed<T, kWidth> x[kVectors], residual[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v].clear();
    if (Layout::col(v) < cols)
      x[v].load_read_only(static_cast<const T*>(p.x) + offset + Layout::col(v));
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    residual[v].clear();
    if (p.residual != nullptr && Layout::col(v) < cols) {
      residual[v].load_read_only(static_cast<const T*>(p.residual) + offset + Layout::col(v));
    }
  }

  const Philox philox(p.dropout);
  float z[kVectors][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int col = Layout::col(v);
    float r[kWidth];
    x[v].unpack(z[v]);
    residual[v].unpack(r);
    if (col < cols) {
      add_residual<T, kWidth>(p, philox, row, col, r, z[v]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += z[v][i];
    }
  }
  const float mean = warp_sum(sum) / static_cast<float>(cols);

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (Layout::col(v) < cols) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += (z[v][i] - mean) * (z[v][i] - mean);
    }
  }
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(cols) + p.eps);
  save_statistics(p, row, mean, rstd);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int col = Layout::col(v);
    if (col < cols) {
      if (p.z != nullptr) store<T, kWidth>(static_cast<T*>(p.z) + offset + col, z[v]);
      normalize<T, kWidth>(p, col, mean, rstd, z[v]);
      store<T, kWidth>(static_cast<T*>(p.y) + offset + col, z[v]);
    }
  }
}

/// Adds each warp's sums of its columns in order and writes them as the group's row of `partial`.
/// Called by the whole block.
template <typename T, int kPerLane>
__device__ __forceinline__ void sum_row_warps(
    const float (&sums)[kPerLane / kVectorWidth<T>][kVectorWidth<T>], float* partial, int cols) {
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

/// Block g takes rows 4 g + warp, + 4 G, …, and writes row g of the three (G, cols) partial sums.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kBackwardBlocksPerSM)
    add_layer_norm_bwd_kernel(const LayerNormBackward p) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth, kVectors = Layout::kVectors;
  const int cols = static_cast<int>(p.cols);
  const float inverse_cols = 1.0f / static_cast<float>(cols);
  const Philox philox(p.dropout);
  float dweight[kVectors][kWidth] = {}, dbias[kVectors][kWidth] = {},
        dx_bias[kVectors][kWidth] = {};

  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y; row < p.rows;
       row += step) {
    const int64_t offset = row * p.cols;
    Packed<T, kWidth> packed_dy[kVectors], packed_z[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed_dy[v].clear();
      packed_z[v].clear();
      if (Layout::col(v) < cols) {
        packed_dy[v].load_read_only(static_cast<const T*>(p.dy) + offset + Layout::col(v));
        packed_z[v].load_read_only(static_cast<const T*>(p.z) + offset + Layout::col(v));
      }
    }
    const float mean = p.mean[row], rstd = p.rstd[row];

    // With n = (z − mean) · rstd and g = dy · weight: dz = rstd (g − E g − n E(g n)).
    float g[kVectors][kWidth], n[kVectors][kWidth];
    float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed_dy[v].unpack(g[v]);
      packed_z[v].unpack(n[v]);
      if (Layout::col(v) < cols) {
        float weight[kWidth];
        p.weight.load<T, kWidth>(Layout::col(v), weight);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          n[v][i] = (n[v][i] - mean) * rstd;
          dweight[v][i] += g[v][i] * n[v][i];
          dbias[v][i] += g[v][i];
          g[v][i] *= weight[i];
          sum_g += g[v][i];
          sum_gn += g[v][i] * n[v][i];
        }
      }
    }
    const float mean_g = warp_sum(sum_g) * inverse_cols;
    const float mean_gn = warp_sum(sum_gn) * inverse_cols;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int col = Layout::col(v);
      if (col < cols) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          g[v][i] = rstd * (g[v][i] - mean_g - n[v][i] * mean_gn);
        }
        store<T, kWidth>(static_cast<T*>(p.dz) + offset + col, g[v]);
        if (p.dropout.active) {
          drop_hidden<kWidth>(philox, p.dropout, static_cast<uint32_t>(row),
                              static_cast<uint32_t>(col), g[v]);
          store<T, kWidth>(static_cast<T*>(p.dx) + offset + col, g[v]);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dx_bias[v][i] += g[v][i];
      }
    }
  }
  sum_row_warps<T, kPerLane>(dweight, p.partial(0, blockIdx.x), cols);
  sum_row_warps<T, kPerLane>(dbias, p.partial(1, blockIdx.x), cols);
  if (p.need_x_bias) sum_row_warps<T, kPerLane>(dx_bias, p.partial(2, blockIdx.x), cols);
}

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

const dim3 kRowBlock(kWarpSize, kRowWarps);

/// Groups of rows in backward, one block each: at least 8 rows a warp, to make the 3 · cols floats
/// that a group writes worth it, and at most a few waves of any GPU. A function of the shape alone,
/// for it fixes the order of the sums.
int64_t backward_groups(int64_t rows) {
  return std::clamp<int64_t>(ceil_div<int64_t>(rows, 8 * kRowWarps), 1, 512);
}

}  // namespace

void add_layer_norm_fwd(const void* x, const void* residual, const void* x_bias, const void* weight,
                        const void* bias, void* y, void* z, float* mean, float* rstd, int64_t rows,
                        int64_t cols, double eps, double dropout_p, const int64_t* dropout_seed,
                        int64_t dropout_offset, int dtype, int vector_dtype, cudaStream_t stream) {
  constexpr const char* kOp = "add_layer_norm_fwd";
  const bool is_float32 = vectors_are_float32(dtype, vector_dtype, kOp);
  const LayerNormForward p{x,
                           residual,
                           {x_bias, is_float32},
                           {weight, is_float32},
                           {bias, is_float32},
                           y,
                           z,
                           mean,
                           rstd,
                           rows,
                           cols,
                           static_cast<float>(eps),
                           make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (rows == 0 || cols == 0) return;
  const dim3 grid(grid_extent(ceil_div<int64_t>(rows, kRowWarps), kOp));
  with_layout(
      dtype, cols, aligned16(x, residual, x_bias, weight, bias, y, z), kOp,
      [&](auto type, auto per_lane) {
        using T = typename decltype(type)::type;
        launch(kOp, add_layer_norm_fwd_kernel<T, decltype(per_lane)::value>, grid, kRowBlock, 0,
               stream, p);
      },
      [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        launch(kOp, add_layer_norm_wide_fwd_kernel<T, decltype(width)::value>, grid, kRowBlock, 0,
               stream, p);
      });
}

int64_t add_layer_norm_bwd_workspace(int64_t rows, int64_t cols) {
  return GroupSums::kMax * backward_groups(rows) * cols;
}

void add_layer_norm_bwd(const void* dy, const void* z, const void* weight, const float* mean,
                        const float* rstd, void* dz, void* dx, void* dweight, void* dbias,
                        void* dx_bias, float* workspace, int64_t rows, int64_t cols,
                        double dropout_p, const int64_t* dropout_seed, int64_t dropout_offset,
                        int dtype, int vector_dtype, cudaStream_t stream) {
  constexpr const char* kOp = "add_layer_norm_bwd";
  const int64_t groups = backward_groups(rows);
  const LayerNormBackward p{dy,
                            z,
                            {weight, vectors_are_float32(dtype, vector_dtype, kOp)},
                            mean,
                            rstd,
                            dz,
                            dx,
                            workspace,
                            groups,
                            rows,
                            cols,
                            dx_bias != nullptr,
                            make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (rows > 0 && p.dropout.active && dx == nullptr) {
    throw std::invalid_argument(std::string(kOp) + ": dx is missing with dropout_p > 0");
  }
  if (cols == 0) return;
  with_layout(
      dtype, cols, aligned16(dy, z, weight, dz, dx), kOp,
      [&](auto type, auto per_lane) {
        using T = typename decltype(type)::type;
        launch(kOp, add_layer_norm_bwd_kernel<T, decltype(per_lane)::value>,
               dim3(static_cast<unsigned>(groups)), kRowBlock, sizeof(float) * kRowWarps * cols,
               stream, p);
      },
      [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        constexpr int kWidth = decltype(width)::value;
        if (rows > 0) {
          launch(kOp, add_layer_norm_wide_bwd_kernel<T, kWidth>,
                 dim3(grid_extent(ceil_div<int64_t>(rows, kRowWarps), kOp)), kRowBlock, 0, stream,
                 p);
        }
        const int64_t column_blocks = ceil_div<int64_t>(cols, kWarpSize * kWidth);
        launch(kOp, add_layer_norm_wide_sums_kernel<T, kWidth>,
               dim3(grid_extent(column_blocks, kOp), static_cast<unsigned>(groups)),
               dim3(kWarpSize, kColumnWarps), kColumnSharedBytes<kWidth>, stream, p);
      });
  sum_groups(workspace, {{dweight, dbias, dx_bias}, vector_dtype}, groups, cols, kOp, stream);
}

}  // namespace fastbert::cuda
