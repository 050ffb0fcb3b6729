// Host side of a launch: errors become exceptions, grid sizes are checked before they wrap.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops.h"

namespace fastbert::cuda {

constexpr int kWarpSize = 32;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

/// What kernels and launchers can move as 16-byte vectors; null pointers do not object.
template <typename... Pointers>
bool aligned16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next launch does not report this failure again
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// The largest extents of a grid.
constexpr int64_t kMostBlocksX = INT32_MAX, kMostBlocksY = 65535;

/// `blocks` as the x extent of a grid, or with `most` as another.
inline unsigned grid_extent(int64_t blocks, const char* op, int64_t most = kMostBlocksX) {
  if (blocks > most) {
    throw std::invalid_argument(std::string(op) + ": too large: needs " + std::to_string(blocks) +
                                " thread blocks, one launch has at most " + std::to_string(most));
  }
  return static_cast<unsigned>(blocks);
}

/// kernel<<<grid, block, shared_bytes, stream>>>(args…), checked.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    // Set at every launch: the attribute belongs to the current device, and setting it is cheap.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          op);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
  check(cudaGetLastError(), op);
}

[[noreturn]] inline void unknown_dtype(const char* op, int dtype) {
  throw std::invalid_argument(std::string(op) + ": dtype code " + std::to_string(dtype) +
                              ": expected 0 (fp32), 1 (bf16) or 3 (fp16)");
}

/// True when the vectors (bias, weight, …) are fp32; they must be that or of the activations'
/// dtype.
inline bool vectors_are_float32(int dtype, int vector_dtype, const char* op) {
  if (vector_dtype != kFloat32 && vector_dtype != dtype) {
    throw std::invalid_argument(std::string(op) + ": vector dtype code " +
                                std::to_string(vector_dtype) + ": expected 0 (fp32) or " +
                                std::to_string(dtype) + ", the activations'");
  }
  return vector_dtype == kFloat32;
}

}  // namespace fastbert::cuda
