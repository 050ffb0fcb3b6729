// The tile instructions of AMX: eight registers tmm0 … tmm7 of up to 16 rows of 64 bytes. Compilers
// know nothing of these registers; volatile asm keeps the order in which they are used.
//
// FASTBERT_AMX_TILES names a header with other definitions of the same functions: the tests emulate
// tiles with it, where there are none.
#pragma once

#include <cstdint>

namespace fastbert {

/// The operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace fastbert

#if defined(FASTBERT_AMX_TILES)
#include FASTBERT_AMX_TILES
#else

namespace fastbert::FASTBERT_ISA {

/// Gives every register its shape, and zeros.
FASTBERT_INLINE void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}

/// Puts the registers out of use: nothing of them is saved at context switches.
FASTBERT_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int kTile>
FASTBERT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

/// Rows of 64 bytes that are `stride` bytes apart.
template <int kTile>
FASTBERT_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FASTBERT_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

/// c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i], signed bytes into int32.
template <int kC, int kA, int kB>
FASTBERT_INLINE void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

/// c[m][n] += Σ_k Σ_i a[m][2k + i] · b[k][2n + i], bf16 into fp32: odd and even products are summed
/// apart, with fused multiply-adds, and then added to c.
template <int kC, int kA, int kB>
FASTBERT_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace fastbert::FASTBERT_ISA

#endif
