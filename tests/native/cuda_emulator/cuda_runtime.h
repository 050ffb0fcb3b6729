// Stands in for CUDA's header when g++ compiles the kernels for the host: the part of CUDA C++ that
// they use, executed by emulator.cpp. One block runs at a time, its threads as fibers of one OS
// thread that change only where threads meet (barriers, shuffles, MMA), so that a run is
// deterministic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Of the running thread; emulator.cpp sets them when it changes fibers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

/// What the lanes of a warp published when they last met.
struct WarpData {
  const unsigned char* slots;
  const void* of_lane(int lane) const { return slots + lane * 64; }
};

/// Where the running thread's warp meets: every lane brings `bytes` of `mine` and goes on, with all
/// lanes' in view until it meets them again, when all live lanes have come. `operation` names the
/// caller: lanes that meet in different operations have diverged, and the kernel ends in an error.
WarpData meet_warp(const char* operation, const void* mine, size_t bytes);
/// The same of the four warps of a warpgroup, which bring nothing.
void meet_warpgroup(const char* operation);
void meet_block();
int lane_index();
int thread_index();  // in the block

/// The running block's dynamic shared memory.
unsigned char* shared_memory();
size_t shared_memory_size();

/// A GPU ends a kernel that accesses a vector off its alignment, a CPU does not care.
inline void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    throw std::runtime_error("misaligned address");
  }
}

/// What the device says that a block may have at most.
int shared_memory_on_offer();

/// cp.async of the running thread.
void copy_async(uint32_t shared, const void* global, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);
bool is_eager();  // what is asynchronous happens when issued, not when waited for

/// Shared memory as wgmma reads it. What a thread copied there is found in it when the thread has
/// published it (fence.proxy.async); ordinary stores, which the emulator does not see, are not.
const unsigned char* shared_memory_of_async_proxy();
void publish_to_async_proxy();

/// wgmma of the running thread (products.cpp): `compute` adds to the 32 sums what `left`, registers
/// that may not change meanwhile, and shared memory hold; `left` is null where no operand is in
/// registers.
void issue_product(const char* operation, float* sums, const uint32_t* left,
                   std::function<void(float*)> compute);
void fence_registers(const void* registers, size_t bytes);
void commit_products();
void wait_for_products(int pending);
void forget_products(size_t threads);  // of the block before
bool has_products();                   // that were never waited for

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <typename T>
T shuffle(T value, int from_lane) {
  T received;
  std::memcpy(&received, meet_warp("shuffle", &value, sizeof(T)).of_lane(from_lane), sizeof(T));
  return received;
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp() { emulator::meet_warp("syncwarp", nullptr, 0); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return emulator::shuffle(value, emulator::lane_index() ^ lane_mask);
}
template <typename T>
T __ldg(const T* from) {
  emulator::check_alignment(from, alignof(T));
  return *from;
}

inline float __uint_as_float(uint32_t x) { return emulator::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits<uint32_t>(x); }
using std::max;
using std::min;

// Host API, as far as launch.cuh uses it.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// A Hopper GPU, which runs every kernel that there is.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::shared_memory_on_offer();
      break;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  constexpr int kMostOnHopper = 227 * 1024;
  return bytes <= kMostOnHopper ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidValue;
  }
  emulator::run_grid(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
