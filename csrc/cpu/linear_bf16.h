// Linear with bf16 weights and fp32 activations: weights are widened in registers, products and
// sums are fp32.
#pragma once

#include "linear_pack.h"

namespace fastbert::FASTBERT_ISA {

struct BFloat16Kernel {
  using Weight = uint16_t;
  using Sum = float;
  static constexpr int64_t kTileRows = 6;
  static constexpr int64_t kBlockRows = 128;
  static constexpr int64_t kPanelColumns = kPanel<float>;
  static constexpr int64_t kStepBytes = 4 * kPanelColumns;

  static int64_t panel_bytes(int64_t in) { return packed_bytes<Weight>(kPanelColumns, in); }
  static void pack_piece(const Weight* w, int64_t in, int64_t columns, void* piece) {
    pack_words<kPanelColumns>(w, in, columns, kColumnBlock, piece);
  }

  struct Rows {
    Rows(int64_t in, const LinearInput& x, int64_t) : in(in), values(x.values) {}
    const int64_t in;
    const float* const values;
  };

  static void tile(const Rows& rows, int64_t first, int64_t count, const void* panel, Ahead& ahead,
                   float (*sums)[kPanelColumns]) {
    const auto tile = tile_of<BFloat16Kernel>(count);
    const int64_t words = word_count<Weight>(rows.in);
    for (int64_t word = 0; word == 0 || word < words; word += kDepth) {
      tile(rows, first, word, static_cast<const uint32_t*>(panel), ahead, sums[0]);
    }
  }

  /// kRows rows from `first` on times kDepth words, from `word` on, of one panel: stored to sums, or
  /// added if there were words before. Short sums are more accurate: one chain of thousands of
  /// additions had twice the error.
  template <int kRows>
  static void tile_rows(const Rows& rows, int64_t first, int64_t word, const uint32_t* panel,
                        Ahead& ahead, float* sums) {
    constexpr int64_t L = kLanes<float>, P = kPanelColumns;
    const int64_t in = rows.in;
    const float* x = rows.values + first * in;
    Vec<float> acc[kRows][kPanelVectors] = {};
    const auto add = [&](int64_t k, const uint32_t* pairs, auto widen) FASTBERT_INLINE_LAMBDA {
      Vec<float> w[kPanelVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) {
        w[j] = reinterpret_cast<Vec<float>>(widen(load_raw<BitsVec>(pairs + j * L)));
      }
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const float factor = x[i * in + k];
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) acc[i][j] += factor * w[j];
      }
    };
    const auto low = [](BitsVec pair) FASTBERT_INLINE_LAMBDA { return pair << 16; };
    const auto high = [](BitsVec pair) FASTBERT_INLINE_LAMBDA { return pair & 0xffff0000u; };
    for_words<P>(word, std::min(word + kDepth, in / 2), ahead,
                 [&](int64_t pair) FASTBERT_INLINE_LAMBDA {
                   add(2 * pair, panel + pair * P, low);
                   add(2 * pair + 1, panel + pair * P, high);
                 });
    if (in % 2 != 0 && in / 2 < word + kDepth) add(in - 1, panel + in / 2 * P, low);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) {
        float* to = sums + i * P + j * L;
        store<float>(to, word == 0 ? acc[i][j] : load<float>(to) + acc[i][j]);
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 128;  // words
};

}  // namespace fastbert::FASTBERT_ISA
