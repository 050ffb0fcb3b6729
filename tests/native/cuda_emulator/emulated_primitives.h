// primitives.cuh on the host. Fragments are laid out as the PTX ISA documents them (sections
// "Matrix fragments for mma.m16n8k16" and "ldmatrix"); lanes exchange theirs through emulator.cpp.
#pragma once

#include <stdexcept>

namespace fastbert::cuda {

inline unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }

inline int reread_thread_index() { return static_cast<int>(threadIdx.x); }

/// Offsets into the block's shared memory serve as addresses.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulator::shared_memory());
}

inline void store_global16(void* global, uint4 value) {
  emulator::check_alignment(global, 16);
  std::memcpy(global, &value, 16);
}

inline void cp_async16(uint32_t shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, 16, valid);
}
inline void cp_async4(uint32_t shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, 4, valid);
}
inline void cp_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::copy_async_wait(kPending);
}

/// Element `col` of row `row` of matrix `matrix`, whose rows' addresses the lanes published.
inline uint16_t matrix_element(const emulator::WarpData& warp, int matrix, int row, int col) {
  uint32_t address;
  std::memcpy(&address, warp.of_lane(8 * matrix + row), sizeof(address));
  if (address % 16 != 0 || address + 16 > emulator::shared_memory_size()) {
    throw std::runtime_error("ldmatrix: row address unaligned or out of shared memory");
  }
  uint16_t element;
  std::memcpy(&element, emulator::shared_memory() + address + 2 * col, sizeof(element));
  return element;
}

inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t shared_row) {
  const auto warp = emulator::meet_warp("ldmatrix", &shared_row, sizeof(shared_row));
  const int row = emulator::lane_index() / 4, col = emulator::lane_index() % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    to[m] = matrix_element(warp, m, row, col) |
            static_cast<uint32_t>(matrix_element(warp, m, row, col + 1)) << 16;
  }
}

inline void ldmatrix_x4_transposed(uint32_t (&to)[4], uint32_t shared_row) {
  const auto warp = emulator::meet_warp("ldmatrix.trans", &shared_row, sizeof(shared_row));
  const int row = emulator::lane_index() % 4 * 2, col = emulator::lane_index() / 4;
  for (int m = 0; m < 4; ++m) {
    to[m] = matrix_element(warp, m, row, col) |
            static_cast<uint32_t>(matrix_element(warp, m, row + 1, col)) << 16;
  }
}

/// What a lane brings to an MMA.
struct MmaOperands {
  uint32_t a[4], b[2];
};

template <typename T>
float half_of(uint32_t pair, int upper) {
  const float2 both = unpack2<T>(pair);
  return upper ? both.y : both.x;
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto warp = emulator::meet_warp("mma", &mine, sizeof(mine));
  const auto operands = [&](int lane) {
    return static_cast<const MmaOperands*>(warp.of_lane(lane));
  };
  const int g = emulator::lane_index() / 4, t = emulator::lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;  // of this k among the four lanes of a row of a or column of b
      const float x = half_of<T>(operands(row % 8 * 4 + owner)->a[row / 8 + k / 8 * 2], k % 2);
      const float y = half_of<T>(operands(col * 4 + owner)->b[k / 8], k % 2);
      sum += static_cast<double>(x) * y;
    }
    c[i] = static_cast<float>(sum);
  }
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace fastbert::cuda
