// Linear on tiles: 32 rows × 32 columns of sums are four tile registers, fed by two of rows and two
// of weights, so that each tile that is loaded is used twice. int8 activations are tiles as they
// lie; for bf16 weights activations are rounded to bf16.
#include "linear.h"

#define FASTBERT_ISA linear_amx
#if defined(__AMX_INT8__) || defined(FASTBERT_AMX_TILES)
#if defined(__AVX512BW__)
#define FASTBERT_VECTOR_BYTES 64
#else
#define FASTBERT_VECTOR_BYTES 16  // emulated tiles only
#endif
#include <type_traits>

#include "linear_run.h"

#include "amx_tiles.h"

namespace fastbert::FASTBERT_ISA {

namespace {

constexpr int64_t kTileSide = 16;      // rows of a tile, and 32-bit words of a row
constexpr int64_t kTileRowBytes = 64;  // K is walked in steps of this many bytes
constexpr int64_t kTileBytes = kTileSide * kTileRowBytes;

/// WeightType: int8_t, or uint16_t (bf16).
template <class WeightType>
struct AmxKernel {
  using Weight = WeightType;
  static constexpr bool kInt8 = std::is_same_v<Weight, int8_t>;
  using Sum = std::conditional_t<kInt8, int32_t, float>;
  static constexpr int64_t kTileRows = 2 * kTileSide;
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kPanelColumns = kColumnBlock;
  static constexpr int64_t kStepBytes = 256;

  static int64_t row_bytes(int64_t in) { return round_up(in * sizeof(Weight), kTileRowBytes); }

  /// Tiles of 16 words of k × 16 columns: [2 halves of the columns][K steps][2 tiles].
  static int64_t panel_bytes(int64_t in) { return kColumnBlock * row_bytes(in); }

  static void pack_piece(const Weight* w, int64_t in, int64_t columns, void* piece) {
    const int64_t steps = row_bytes(in) / kTileRowBytes, bytes = in * sizeof(Weight);
    __builtin_memset(piece, 0, panel_bytes(in));
    for (int64_t word = 0; 4 * word < bytes; ++word) {
      const int64_t count = std::min<int64_t>(4, bytes - 4 * word);
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t half = column / kTileRows, tile = column / kTileSide % 2;
        char* to = static_cast<char*>(piece) +
                   ((half * steps + word / kTileSide) * 2 + tile) * kTileBytes +
                   word % kTileSide * kTileRowBytes + column % kTileSide * 4;
        __builtin_memcpy(to, reinterpret_cast<const char*>(w + column * in) + 4 * word, count);
      }
    }
  }

  class Rows {
   public:
    Rows(int64_t in, const LinearInput& x, int64_t count) : stride(row_bytes(in)) {
      if constexpr (kInt8) {
        bytes = reinterpret_cast<const char*>(x.quantized);
      } else {
        bytes = round_rows(in, x.values, count);
      }
    }
    Rows(const Rows&) = delete;
    ~Rows() { tile_release(); }

    /// Shapes the registers for `count` rows: tmm4 has the first 16, tmm5 the others.
    void configure(int64_t count) const {
      if (count == configured_) return;
      configured_ = count;
      const int64_t rest = count - kTileSide;
      const auto first = static_cast<uint8_t>(std::min(count, kTileSide));
      const auto second = static_cast<uint8_t>(rest > 0 ? rest : kTileSide);  // 0 is none
      TileConfig config;
      const uint8_t rows[] = {first, first, second, second, first, second, kTileSide, kTileSide};
      for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = rows[tile];
        config.row_bytes[tile] = kTileRowBytes;
      }
      tile_configure(config);
    }

    const int64_t stride;
    const char* bytes;

   private:
    /// x (count × in) as bf16, rows `stride` bytes long and padded with zeros.
    const char* round_rows(int64_t in, const float* x, int64_t count) const {
      char* const rounded = thread_scratch<char>(Scratch::kLinear, count * stride);
      for (int64_t row = 0; row < count; ++row) {
        char* const to = rounded + row * stride;
        __builtin_memset(to + in * 2, 0, stride - in * 2);
        for_vectors<float>(in, [=](int64_t k, auto lanes) FASTBERT_INLINE_LAMBDA {
          round_to_bf16(load<float>(x + row * in + k, lanes), to + 2 * k);
        });
      }
      return rounded;
    }

    mutable int64_t configured_ = 0;
  };

  static void tile(const Rows& rows, int64_t first, int64_t count, const void* panel, Ahead& ahead,
                   Sum (*sums)[kPanelColumns]) {
    constexpr int64_t kSumBytes = kColumnBlock * sizeof(Sum);
    const bool both = count > kTileSide;
    const int64_t steps = rows.stride / kTileRowBytes;
    const char* w = static_cast<const char*>(panel);
    rows.configure(count);
    for (int64_t column = 0; column < kColumnBlock; column += 2 * kTileSide) {
      const char* x = rows.bytes + first * rows.stride;
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t i = 0; i < 2 * kTileBytes; i += kStepBytes) ahead.step<kStepBytes>();
        tile_load<4>(x, rows.stride);
        tile_load<6>(w, kTileRowBytes);
        tile_load<7>(w + kTileBytes, kTileRowBytes);
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        if (both) {
          tile_load<5>(x + kTileSide * rows.stride, rows.stride);
          tile_dot<2, 5, 6>();
          tile_dot<3, 5, 7>();
        }
        x += kTileRowBytes;
        w += 2 * kTileBytes;
      }
      tile_store<0>(sums[0] + column, kSumBytes);
      tile_store<1>(sums[0] + column + kTileSide, kSumBytes);
      if (both) {
        tile_store<2>(sums[kTileSide] + column, kSumBytes);
        tile_store<3>(sums[kTileSide] + column + kTileSide, kSumBytes);
      }
    }
  }

  template <int kC, int kA, int kB>
  static FASTBERT_INLINE void tile_dot() {
    if constexpr (kInt8) {
      tile_dot_int8<kC, kA, kB>();
    } else {
      tile_dot_bf16<kC, kA, kB>();
    }
  }

  /// kLanes values as bf16; the lanes behind the last real one are 0 and may be written, too.
  static FASTBERT_INLINE void round_to_bf16(Vec<float> value, char* to) {
#if defined(__AVX512BF16__)
    store_raw(to, _mm512_cvtneps_pbh(value));  // subnormals become 0, as tiles take them anyway
#else
    store<float>(reinterpret_cast<bf16*>(to), value);
#endif
  }
};

}  // namespace

const LinearTable* linear_table() {
  return LinearUnit<AmxKernel<int8_t>, AmxKernel<uint16_t>>::table("amx");
}

}  // namespace fastbert::FASTBERT_ISA

#else

namespace fastbert::FASTBERT_ISA {

const LinearTable* linear_table() { return nullptr; }

}  // namespace fastbert::FASTBERT_ISA

#endif
