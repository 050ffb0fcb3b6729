// y = gelu(x + bias) and its gradients, one pass over memory each.
//
// A lane owns 16 bytes of columns, whose bias it loads once, and walks down the rows of its group
// with several rows' loads in flight.
#include <algorithm>
#include <type_traits>

#include "reduce.cuh"
#include "vector.cuh"

namespace fastbert::cuda {
namespace {

constexpr float kSqrtHalf = 0.70710678118654752f;      // 1/√2
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;  // 1/√(2π)
// tanh form: ½ (1 + tanh w) = 1 / (1 + exp(−2w)), 2w = u (kTanhLinear + kTanhCubic u²)
constexpr float kTanhLinear = 1.59576912160573071f;  // 2 √(2/π)
constexpr float kTanhCubic = 0.07135481282565130f;   // 2 √(2/π) · 0.044715

/// The share of u that passes: Φ(u), or its tanh approximation as a logistic function, which unlike
/// 1 + tanh(w) loses no digits for negative u.
template <bool kTanh>
__device__ __forceinline__ float gate(float u) {
  if constexpr (kTanh) {
    return 1.0f / (1.0f + expf(-u * (kTanhLinear + kTanhCubic * u * u)));
  } else {
    return 0.5f + 0.5f * erff(u * kSqrtHalf);
  }
}

template <bool kTanh>
__device__ __forceinline__ float gelu(float u) {
  return u * gate<kTanh>(u);
}

/// d(u · gate(u)) / du
template <bool kTanh>
__device__ __forceinline__ float gelu_derivative(float u) {
  if constexpr (kTanh) {
    // Beyond ±30 the gate is 0 or 1 in fp32 and its slope 0, but u² may overflow: 0 · ∞. The
    // comparison is false for NaN, which stays NaN.
    const float v = fabsf(u) > 30.0f ? copysignf(30.0f, u) : u;
    const float g = gate<true>(v);
    return g + v * g * (1.0f - g) * (kTanhLinear + 3.0f * kTanhCubic * v * v);
  } else {
    return gate<false>(u) + u * kInvSqrtTwoPi * expf(-0.5f * u * u);
  }
}

// Bounds on registers, 64 and 85: left to itself ptxas spills a few for an occupancy without use
// here.
constexpr int kForwardBlocksPerSM = 4;
constexpr int kBackwardBlocksPerSM = 3;

/// Groups of rows: enough blocks to fill any GPU a few times over, but no more than leave each warp
/// `rows_a_warp` rows. A function of the shape alone, for it fixes the order of the sums.
int64_t row_groups(int64_t rows, int64_t cols, int64_t rows_a_warp, int64_t blocks) {
  const int64_t column_blocks = ceil_div<int64_t>(cols, kWarpSize * kVectorWidth<bf16>);
  const int64_t most = std::clamp<int64_t>(blocks / column_blocks, 1, 65535);
  return std::clamp<int64_t>(ceil_div<int64_t>(rows, kColumnWarps * rows_a_warp), 1, most);
}

int64_t forward_groups(int64_t rows, int64_t cols) { return row_groups(rows, cols, 1, 8192); }

/// Fewer than in forward: each group costs `cols` floats of partial sums, written and read.
int64_t backward_groups(int64_t rows, int64_t cols) { return row_groups(rows, cols, 4, 2048); }

dim3 make_grid(int64_t cols, int width, int64_t groups, const char* op) {
  return dim3(grid_extent(ceil_div<int64_t>(cols, kWarpSize * width), op),
              static_cast<unsigned>(groups));
}

const dim3 kBlock(kWarpSize, kColumnWarps);

template <typename T, int kWidth, bool kTanh>
__global__ void __launch_bounds__(kWarpSize* kColumnWarps, kForwardBlocksPerSM)
    bias_gelu_fwd_kernel(const T* __restrict__ x, Parameter bias, T* __restrict__ y, int64_t rows,
                         int64_t cols) {
  constexpr int kRowsInFlight = 4;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * kWidth;
  if (col >= cols) return;
  float b[kWidth] = {};
  if (bias.data != nullptr) bias.load<T, kWidth>(col, b);

  const int64_t step = static_cast<int64_t>(gridDim.y) * kColumnWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumnWarps + threadIdx.y;
  for (int64_t base = first; base < rows; base += kRowsInFlight * step) {
    Packed<T, kWidth> packed[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = base + i * step;
      if (row < rows) packed[i].load(x + row * cols + col);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = base + i * step;
      if (row >= rows) break;
      float u[kWidth];
      packed[i].unpack(u);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) u[j] = gelu<kTanh>(u[j] + b[j]);
      store<T, kWidth>(y + row * cols + col, u);
    }
  }
}

/// `partials` (groups, cols) is null when no dbias is wanted.
template <typename T, int kWidth, bool kTanh>
__global__ void __launch_bounds__(kWarpSize* kColumnWarps, kBackwardBlocksPerSM)
    bias_gelu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, Parameter bias,
                         T* __restrict__ dx, float* __restrict__ partials, int64_t rows,
                         int64_t cols) {
  constexpr int kRowsInFlight = 2;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * kWidth;
  float sums[kWidth] = {};
  if (col < cols) {
    float b[kWidth] = {};
    if (bias.data != nullptr) bias.load<T, kWidth>(col, b);

    const int64_t step = static_cast<int64_t>(gridDim.y) * kColumnWarps;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumnWarps + threadIdx.y;
    for (int64_t base = first; base < rows; base += kRowsInFlight * step) {
      Packed<T, kWidth> packed_dy[kRowsInFlight], packed_x[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t row = base + i * step;
        if (row < rows) {
          packed_dy[i].load(dy + row * cols + col);
          packed_x[i].load(x + row * cols + col);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t row = base + i * step;
        if (row >= rows) break;
        float g[kWidth], u[kWidth];
        packed_dy[i].unpack(g);
        packed_x[i].unpack(u);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          g[j] *= gelu_derivative<kTanh>(u[j] + b[j]);
          sums[j] += g[j];
        }
        store<T, kWidth>(dx + row * cols + col, g);
      }
    }
  }
  if (partials != nullptr) {
    sum_column_warps<kWidth>(sums, partials + static_cast<int64_t>(blockIdx.y) * cols, col, cols);
  }
}

/// Calls body(Type<T>, width, tanh) with the last two as compile-time constants.
template <typename Body>
void with_variant(int dtype, int64_t cols, bool aligned, bool tanh, const char* op, Body&& body) {
  with_type(dtype, op, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with_width = [&](auto width) {
      if (tanh) {
        body(type, width, std::true_type{});
      } else {
        body(type, width, std::false_type{});
      }
    };
    if (aligned && cols % kVectorWidth<T> == 0) {
      with_width(std::integral_constant<int, kVectorWidth<T>>{});
    } else {
      with_width(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void bias_gelu_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool tanh,
                   int dtype, int vector_dtype, cudaStream_t stream) {
  constexpr const char* kOp = "bias_gelu_fwd";
  const Parameter b{bias, vectors_are_float32(dtype, vector_dtype, kOp)};
  if (rows == 0 || cols == 0) return;
  with_variant(dtype, cols, aligned16(x, bias, y), tanh, kOp,
               [&](auto type, auto width, auto is_tanh) {
                 using T = typename decltype(type)::type;
                 constexpr int kWidth = decltype(width)::value;
                 launch(kOp, bias_gelu_fwd_kernel<T, kWidth, decltype(is_tanh)::value>,
                        make_grid(cols, kWidth, forward_groups(rows, cols), kOp), kBlock, 0, stream,
                        static_cast<const T*>(x), b, static_cast<T*>(y), rows, cols);
               });
}

int64_t bias_gelu_bwd_workspace(int64_t rows, int64_t cols) {
  return backward_groups(rows, cols) * cols;
}

void bias_gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                   float* workspace, int64_t rows, int64_t cols, bool tanh, int dtype,
                   int vector_dtype, cudaStream_t stream) {
  constexpr const char* kOp = "bias_gelu_bwd";
  const Parameter b{bias, vectors_are_float32(dtype, vector_dtype, kOp)};
  if (cols == 0 || (rows == 0 && dbias == nullptr)) return;
  const int64_t groups = backward_groups(rows, cols);
  float* partials = dbias == nullptr ? nullptr : workspace;
  with_variant(dtype, cols, aligned16(dy, x, bias, dx), tanh, kOp,
               [&](auto type, auto width, auto is_tanh) {
                 using T = typename decltype(type)::type;
                 constexpr int kWidth = decltype(width)::value;
                 launch(kOp, bias_gelu_bwd_kernel<T, kWidth, decltype(is_tanh)::value>,
                        make_grid(cols, kWidth, groups, kOp), kBlock, kColumnSharedBytes<kWidth>,
                        stream, static_cast<const T*>(dy), static_cast<const T*>(x), b,
                        static_cast<T*>(dx), partials, rows, cols);
               });
  if (dbias != nullptr) {
    sum_groups(workspace, {{dbias, nullptr, nullptr}, vector_dtype}, groups, cols, kOp, stream);
  }
}

}  // namespace fastbert::cuda
