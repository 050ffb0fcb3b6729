// Hopper's matrix products of a warpgroup (4 warps, 128 threads), which run beside it: wgmma, in
// code for sm_90a alone. Like primitives.cuh, one function an instruction.
//
// The order that a product asks for:
//   wgmma_fence(registers);   what was written to the registers is seen by the products after it
//   wgmma_…_a(…); …           start; sums and left operands may not be touched from here on
//   wgmma_commit();           closes a group
//   wgmma_wait<n>(sums);      the sums of all but the n newest groups are there
#pragma once

#include <type_traits>

#include "primitives.cuh"

#if defined(FASTBERT_CUDA_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTBERT_WGMMA_CODE 1  // of this compilation pass
#endif

namespace fastbert::cuda {

constexpr int kWarpgroupSize = 4 * kWarpSize;

// Operands in shared memory are lines of 128 bytes, 8 of them an atom of 1024 bytes and aligned to
// that, in which chunk c (16 bytes) of line l lies at chunk c ^ (l % 8): wgmma's 128-byte swizzle,
// which spares bank conflicts.
constexpr uint32_t kSwizzleLineBytes = 128;
constexpr uint32_t kSwizzleAtomBytes = 8 * kSwizzleLineBytes;

__device__ __forceinline__ constexpr uint32_t swizzled_offset(int line, int chunk) {
  return line * kSwizzleLineBytes + ((chunk ^ line) & 7) * 16;
}

/// Describes the operand at `shared` to wgmma (PTX ISA, "Matrix descriptor"): from bit 0 the start,
/// in units of 16 bytes; from bit 16 the distance to the atom with what a line has no room for,
/// which 64 elements do not need; from bit 32 that to the atom of the next 8 lines; from bit 62 the
/// swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t shared) {
  constexpr uint64_t kUnit = 16;
  return (shared & 0x3ffff) / kUnit | uint64_t{1} << 16 | kSwizzleAtomBytes / kUnit << 32 |
         uint64_t{1} << 62;
}

/// The operand `bytes` further on.
__device__ __forceinline__ uint64_t matrix_at(uint64_t descriptor, uint32_t bytes) {
  // In the lower half alone: the uniform registers that hold descriptors add 32 bits at a time.
  return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

}  // namespace fastbert::cuda

#ifdef FASTBERT_CUDA_EMULATOR
#include <emulated_wgmma.h>
#else

namespace fastbert::cuda {

/// What this thread wrote to shared memory is, after the next barrier, what wgmma reads: it goes
/// another way to it than loads and stores do.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// To the compiler a product is over when its instruction is. An empty statement that may change a
// register keeps it from computing the register's value later, or reading it earlier, than here.
template <int kTiles>
__device__ __forceinline__ void pin(float (&registers)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(registers[i / 4][i % 4])::"memory");
}
template <int kTiles>
__device__ __forceinline__ void pin(uint32_t (&registers)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending, int kTiles>
__device__ __forceinline__ void wgmma_wait(float (&sums)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(sums);
}

// Eight tiles of c (16 × 8 a warp) as the operands of an instruction.
#define FASTBERT_WGMMA_SUMS                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define FASTBERT_WGMMA_TILE(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define FASTBERT_WGMMA_TILES(c)                                                        \
  FASTBERT_WGMMA_TILE(c[0]), FASTBERT_WGMMA_TILE(c[1]), FASTBERT_WGMMA_TILE(c[2]),     \
      FASTBERT_WGMMA_TILE(c[3]), FASTBERT_WGMMA_TILE(c[4]), FASTBERT_WGMMA_TILE(c[5]), \
      FASTBERT_WGMMA_TILE(c[6]), FASTBERT_WGMMA_TILE(c[7])

/// c[0 … 7] = a · bᵀ, or += if `accumulate`: c (64 × 64, fp32), of which warp w of the warpgroup has
/// rows 16 w … 16 w + 15 and in c[j] columns 8 j … 8 j + 7, laid out in its lanes as
/// mma_m16n8k16() has them; a and b (64 × 16 of T), described, a line each row.
template <typename T>
__device__ __forceinline__ void wgmma_shared_a(float (*c)[4], uint64_t a, uint64_t b,
                                               bool accumulate) {
#define FASTBERT_WGMMA(TYPE)                                                              \
  asm volatile(                                                                           \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " FASTBERT_WGMMA_SUMS \
      "%32, %33, accumulate, 1, 1, 0, 0;\n}"                                              \
      : FASTBERT_WGMMA_TILES(c)                                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                                 \
      : "memory")
  if constexpr (std::is_same_v<T, bf16>) {
    FASTBERT_WGMMA("bf16");
  } else {
    FASTBERT_WGMMA("f16");
  }
#undef FASTBERT_WGMMA
}

/// c[0 … 7] += a · b: c as above; a (64 × 16) in registers, warp w's rows 16 w … 16 w + 15 laid out
/// as for mma_m16n8k16(); b (16 × 64), described, a line each row.
template <typename T>
__device__ __forceinline__ void wgmma_register_a(float (*c)[4], const uint32_t (&a)[4],
                                                 uint64_t b) {
#define FASTBERT_WGMMA(TYPE)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " FASTBERT_WGMMA_SUMS \
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                            \
               : FASTBERT_WGMMA_TILES(c)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                \
               : "memory")
  if constexpr (std::is_same_v<T, bf16>) {
    FASTBERT_WGMMA("bf16");
  } else {
    FASTBERT_WGMMA("f16");
  }
#undef FASTBERT_WGMMA
}

#undef FASTBERT_WGMMA_SUMS
#undef FASTBERT_WGMMA_TILE
#undef FASTBERT_WGMMA_TILES

}  // namespace fastbert::cuda

#endif
