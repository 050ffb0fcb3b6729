// The int8 peak of one thread: multiply-adds of independent accumulators that never leave registers.
//
// ops counts a multiplication and an addition each, as a Linear's 2·M·N·K does. Every loop is the
// shortest exact one of its instruction set: without VNNI, int8 is widened to int16 and vpmaddwd
// and vpaddd do the work, as vpmaddubsw saturates.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>

namespace {

constexpr int kRepeats = 2000;  // rounds between two looks at the clock

struct alignas(64) Data {
  uint8_t a[2][1024], b[2][1024], out[4][1024];
};

// In assembly, as compilers keep arrays of accumulators in memory. `move` fills registers 12 and 13
// with data; a round is `step` on accumulators 0 to 11, enough for a latency of 5 cycles at two
// instructions a cycle; 14 and 15 are its scratch.
#define FASTBERT_TWELVE(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)
#define FASTBERT_LOOP(move, reg, step)                                                           \
  long rounds = kRepeats;                                                                        \
  asm volatile(move " (%[a]), %%" reg "12\n\t" move " (%[b]), %%" reg                            \
                    "13\n"                                                                       \
                    "1:\n\t" FASTBERT_TWELVE(step) "dec %[rounds]\n\tjnz 1b\n\tvzeroupper\n\t"   \
               : [rounds] "+r"(rounds)                                                           \
               : [a] "r"(data.a[0]), [b] "r"(data.b[0])                                          \
               : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                 "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");

constexpr double ops(int multiply_adds) { return 2.0 * multiply_adds * 12 * kRepeats; }

double avx512_vnni(Data& data) {
#define FASTBERT_STEP(c) "vpdpbusd %%zmm13, %%zmm12, %%zmm" #c "\n\t"
  FASTBERT_LOOP("vmovdqu64", "zmm", FASTBERT_STEP)
#undef FASTBERT_STEP
  return ops(64);
}

double avx512(Data& data) {
#define FASTBERT_STEP(c)                   \
  "vpmaddwd %%zmm13, %%zmm12, %%zmm14\n\t" \
  "vpaddd %%zmm14, %%zmm" #c ", %%zmm" #c "\n\t"
  FASTBERT_LOOP("vmovdqu64", "zmm", FASTBERT_STEP)
#undef FASTBERT_STEP
  return ops(32);
}

double avx2_vnni(Data& data) {
#define FASTBERT_STEP(c) "%{vex%} vpdpbusd %%ymm13, %%ymm12, %%ymm" #c "\n\t"
  FASTBERT_LOOP("vmovdqu", "ymm", FASTBERT_STEP)
#undef FASTBERT_STEP
  return ops(32);
}

double avx2(Data& data) {
#define FASTBERT_STEP(c)                   \
  "vpmaddwd %%ymm13, %%ymm12, %%ymm14\n\t" \
  "vpaddd %%ymm14, %%ymm" #c ", %%ymm" #c "\n\t"
  FASTBERT_LOOP("vmovdqu", "ymm", FASTBERT_STEP)
#undef FASTBERT_STEP
  return ops(16);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 accumulate the four products of 4, 5 with 6, 7.
__attribute__((target("amx-tile,amx-int8"))) double amx(Data& data) {
  const TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, data.a[0], 64);
  _tile_loadd(5, data.a[1], 64);
  _tile_loadd(6, data.b[0], 64);
  _tile_loadd(7, data.b[1], 64);
  for (int n = 0; n < kRepeats; ++n) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, data.out[0], 64);
  _tile_stored(1, data.out[1], 64);
  _tile_stored(2, data.out[2], 64);
  _tile_stored(3, data.out[3], 64);
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 64 * kRepeats;
}

bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

/// Operations a second on the calling thread, the best of many short runs within `seconds`; 0 for an
/// instruction set that has no loop here. The CPU must have it.
extern "C" double int8_peak(const char* isa, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto named = [&](const char* name) { return std::strcmp(isa, name) == 0; };
  double (*loop)(Data&) = nullptr;
  if (named("avx512_vnni")) loop = avx512_vnni;
  if (named("avx512")) loop = avx512;
  if (named("avx2_vnni")) loop = avx2_vnni;
  if (named("avx2")) loop = avx2;
  if (named("amx") && tiles_granted()) loop = amx;
  if (loop == nullptr) return 0;
  Data data{};
  std::mt19937 random(1);
  for (auto* tiles : {&data.a, &data.b}) {
    for (auto& tile : *tiles) {
      for (auto& x : tile) x = static_cast<uint8_t>(random());
    }
  }
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  for (auto start = Clock::now(); start < end;) {
    const double ops = loop(data);
    const auto now = Clock::now();
    best = std::max(best, ops / std::chrono::duration<double>(now - start).count());
    start = now;
  }
  return best;
}
