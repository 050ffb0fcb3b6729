// y = LayerNorm(residual + dropout(x + x_bias)) and its gradients: one warp a row.
//
// Rows of up to 1024 columns stay in the warp's registers, loaded once in 16-byte vectors (768 bf16
// are three a lane); see add_layer_norm_wide.cuh for other widths and for pointers off 16-byte
// boundaries.
#include "add_layer_norm_wide.cuh"

namespace fastbert::cuda {
namespace {

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
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float r[kWidth];
    x[v].unpack(z[v]);
    residual[v].unpack(r);
    if (Layout::col(v) < cols) add_residual<T, kWidth>(p, philox, row, Layout::col(v), r, z[v]);
  }
  const RowStatistics statistics = row_statistics<T, kPerLane>(z, cols, p.eps);
  statistics.save(p.mean, p.rstd, row);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int col = Layout::col(v);
    if (col < cols) {
      if (p.z != nullptr) store<T, kWidth>(static_cast<T*>(p.z) + offset + col, z[v]);
      normalize<T, kWidth>(p.weight, p.bias, col, statistics, z[v]);
      store<T, kWidth>(static_cast<T*>(p.y) + offset + col, z[v]);
    }
  }
}

/// Block g takes rows 4 g + warp, + 4 G, …, and writes row g of the three (G, cols) partial sums.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kBackwardBlocksPerSM)
    add_layer_norm_bwd_kernel(const LayerNormBackward p) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth, kVectors = Layout::kVectors;
  const int cols = static_cast<int>(p.cols);
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
    float g[kVectors][kWidth], z[kVectors][kWidth];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed_dy[v].unpack(g[v]);
      packed_z[v].unpack(z[v]);
    }
    row_gradient<T, kPerLane>(p.weight, cols, {p.mean[row], p.rstd[row]}, g, z, dweight, dbias);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int col = Layout::col(v);
      if (col < cols) {
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
               dim3(static_cast<unsigned>(groups)), kRowBlock, row_shared_bytes(cols), stream, p);
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
