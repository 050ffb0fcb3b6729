// wgmma.cuh on the host: operands are found in shared memory by their descriptors, and fragments in
// registers, as the PTX ISA documents them (sections "Matrix descriptor", "Strides", "Swizzling
// modes" and "Register fragments" of wgmma.mma_async); products.cpp says when they are computed.
#pragma once

#include <array>
#include <stdexcept>

namespace fastbert::cuda {

inline void fence_async_proxy() { emulator::publish_to_async_proxy(); }

template <typename... Registers>
void wgmma_fence(Registers&... registers) {
  emulator::meet_warpgroup("wgmma.fence");
  (emulator::fence_registers(&registers, sizeof(registers)), ...);
}

inline void wgmma_commit() { emulator::commit_products(); }

template <int kPending, int kTiles>
void wgmma_wait(float (&)[kTiles][4]) {
  emulator::wait_for_products(kPending);
}

/// Element `index` of line `line` of a described operand.
template <typename T>
float described(uint64_t descriptor, int line, int index) {
  const auto field = [&](int bit, int bits) { return descriptor >> bit & ((1u << bits) - 1); };
  constexpr uint64_t kKnownBits = 0xc00e3fff3fff3fff;
  if ((descriptor & ~kKnownBits) != 0 || field(62, 2) != 1 || field(49, 3) != 0) {
    throw std::runtime_error(
        "wgmma: descriptor has unknown bits, or no 128-byte swizzle at offset 0");
  }
  const uint64_t start = field(0, 14) * 16, next_lines = field(32, 14) * 16;
  uint64_t address = start + line / 8 * next_lines + line % 8 * 128 + index * 2;
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > emulator::shared_memory_size()) {
    throw std::runtime_error("wgmma: operand out of shared memory");
  }
  uint16_t element;
  std::memcpy(&element, emulator::shared_memory_of_async_proxy() + address, sizeof(element));
  return half_of<T>(element, 0);
}

/// This lane's part of sums (+)= a · b, a given by its rows in the warpgroup, b by row and column.
template <typename A, typename B>
void add_product(float* sums, A a, B b, bool accumulate) {
  const int g = emulator::lane_index() / 4, t = emulator::lane_index() % 4;
  const int warp_row = emulator::thread_index() / 32 % 4 * 16;
  for (int i = 0; i < 32; ++i) {
    const int row = warp_row + g + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * t + i % 2;
    double sum = accumulate ? sums[i] : 0.0;
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a(row, k)) * b(k, col);
    sums[i] = static_cast<float>(sum);
  }
}

template <typename T>
void wgmma_shared_a(float (*c)[4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::issue_product("wgmma", *c, nullptr, [=](float* sums) {
    add_product(
        sums, [=](int row, int k) { return described<T>(a, row, k); },
        [=](int k, int col) { return described<T>(b, col, k); }, accumulate);
  });
}

template <typename T>
void wgmma_register_a(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
  const uint32_t* mine = a;
  const auto warp = emulator::meet_warp("wgmma, a in registers", &mine, sizeof(mine));
  std::array<const uint32_t*, 4> of_row;  // the registers of the lanes that share this one's rows
  for (int t = 0; t < 4; ++t) {
    std::memcpy(&of_row[t], warp.of_lane(emulator::lane_index() / 4 * 4 + t), sizeof(mine));
  }
  emulator::issue_product("wgmma, a in registers", *c, a, [=](float* sums) {
    add_product(
        sums,
        [=](int row, int k) {
          return half_of<T>(of_row[k % 8 / 2][row % 16 / 8 + k / 8 * 2], k % 2);
        },
        [=](int k, int col) { return described<T>(b, k, col); }, true);
  });
}

}  // namespace fastbert::cuda
