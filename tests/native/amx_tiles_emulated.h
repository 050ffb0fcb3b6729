// The tiles of csrc/cpu/amx_tiles.h without AMX: eight arrays, and the instructions by their
// definition (Intel's manual; flushing of subnormals is left out, and they are in no test).
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace fastbert::FASTBERT_ISA {

struct EmulatedTile {
  int rows = 0;
  int row_bytes = 0;
  char data[16][64];
};
inline EmulatedTile tiles[8];

inline void tile_configure(const TileConfig& config) {
  if (config.palette != 1) std::abort();
  for (int tile = 0; tile < 8; ++tile) {
    if (config.rows[tile] < 1 || config.rows[tile] > 16 || config.row_bytes[tile] != 64)
      std::abort();
    tiles[tile].rows = config.rows[tile];
    tiles[tile].row_bytes = config.row_bytes[tile];
    std::memset(tiles[tile].data, 0, sizeof tiles[tile].data);
  }
}

/// What is used without a configuration has no rows: check() ends the process, as the CPU would.
inline void tile_release() {
  for (EmulatedTile& tile : tiles) tile.rows = 0;
}
inline EmulatedTile& check(int tile) {
  if (tiles[tile].rows == 0) std::abort();
  return tiles[tile];
}

template <int kTile>
void tile_zero() {
  std::memset(check(kTile).data, 0, sizeof tiles[kTile].data);
}

template <int kTile>
void tile_load(const void* from, int64_t stride) {
  EmulatedTile& tile = check(kTile);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(tile.data[row], static_cast<const char*>(from) + row * stride, tile.row_bytes);
  }
}

template <int kTile>
void tile_store(void* to, int64_t stride) {
  const EmulatedTile& tile = check(kTile);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile.data[row], tile.row_bytes);
  }
}

template <class T>
T element(const EmulatedTile& tile, int row, int column) {
  T value;
  std::memcpy(&value, tile.data[row] + column * sizeof(T), sizeof(T));
  return value;
}

/// The shapes of a product: C (m × n words), A (m × k words), B (k × n words).
inline void check_product(int c, int a, int b) {
  const bool fits = check(c).rows == check(a).rows && check(b).rows * 4 == tiles[a].row_bytes &&
                    tiles[c].row_bytes == tiles[b].row_bytes;
  if (!fits) std::abort();
}

template <int kC, int kA, int kB>
void tile_dot_int8() {
  check_product(kC, kA, kB);
  EmulatedTile &c = tiles[kC], &a = tiles[kA], &b = tiles[kB];
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < 16; ++n) {
      auto sum = element<uint32_t>(c, m, n);
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += element<int8_t>(a, m, 4 * k + i) * element<int8_t>(b, k, 4 * n + i);
        }
      }
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
  }
}

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <int kC, int kA, int kB>
void tile_dot_bf16() {
  check_product(kC, kA, kB);
  EmulatedTile &c = tiles[kC], &a = tiles[kA], &b = tiles[kB];
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] = std::fma(widened(element<uint16_t>(a, m, 2 * k + i)),
                             widened(element<uint16_t>(b, k, 2 * n + i)), sums[i]);
        }
      }
      const float sum = element<float>(c, m, n) + (sums[0] + sums[1]);
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace fastbert::FASTBERT_ISA
