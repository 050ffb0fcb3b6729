// int8 Linear on vpmaddubsw, exact. It multiplies unsigned bytes by signed ones, adds two products,
// and saturates at 16 bits. With u = x + 127 for unsigned bytes (0 … 254, as |x| ≤ 127),
//
//   Σ_k x[k] w[k] = Σ_k u[k] w[k] − 127 Σ_k w[k]
//
// and the last term, one number a column, is what the sums start from. No sum of a pair saturates if
// its weights of one sign add up to 129 at most: 254 · 129 < 2¹⁵. Trained weights are bell-shaped, so
// that few pairs do not. What such a pair has too much is taken off the weight of its even k and
// listed with the panel, as 16-bit weights for vpmaddwd. Three instructions for 32 products then do
// what four do on 16-bit weights throughout (linear_widened.h), which is how a panel with a long
// list is computed.
//
// AVX2: 1.45 times as fast as that where no pair is listed. Where the largest of a row's 768 weights
// is 3.3 standard deviations, as in a Gaussian (others have longer tails), 12% of k are listed for
// some of 16 columns, and BERT-base is 1.2 times as fast.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "linear_widened.h"

namespace fastbert::FASTBERT_ISA {

/// sum + Σ of four products of bytes: `u` unsigned, `s` signed, no pair of which saturates.
FASTBERT_INLINE IntVec<float> dot4(IntVec<float> sum, IntVec<float> u, IntVec<float> s) {
#if FASTBERT_VECTOR_BYTES == 64
  const __m512i pairs =
      _mm512_maddubs_epi16(reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s));
  return sum + reinterpret_cast<IntVec<float>>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
  const __m256i pairs =
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(u), reinterpret_cast<__m256i>(s));
  return sum + reinterpret_cast<IntVec<float>>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/// The even 16-bit lanes of `even` and the odd ones of `odd`.
FASTBERT_INLINE Int16Vec alternate(Int16Vec even, Int16Vec odd) {
#if FASTBERT_VECTOR_BYTES == 64
  return reinterpret_cast<Int16Vec>(_mm512_mask_blend_epi16(
      0xaaaaaaaa, reinterpret_cast<__m512i>(even), reinterpret_cast<__m512i>(odd)));
#else
  return reinterpret_cast<Int16Vec>(
      _mm256_blend_epi16(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0xaa));
#endif
}

struct PairsKernel {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int kVectors = kPanelVectors;
  static constexpr int64_t kPanelColumns = kVectors * kLanes<float>;
  static constexpr int64_t kTileRows = 6;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kStepBytes = 4 * kPanelColumns;

  /// A packed panel: `listed` pairs of even k, or -1 where the words are all of the weights;
  /// start[P]; the words; k / 2 of each pair (2); its 16-bit weights (P × 2).
  struct Panel {
    Panel(int64_t in, const void* panel)
        : listed(static_cast<int32_t*>(const_cast<void*>(panel))),
          start(listed + kHeader),
          words(start + kPanelColumns),
          ks(words + word_count<Weight>(in) * kPanelColumns),
          rests(ks + round_up(2 * most_pairs(in), kHeader)) {}
    int32_t* const listed;
    int32_t* const start;
    int32_t* const words;
    int32_t* const ks;
    int32_t* const rests;
  };
  static constexpr int64_t kHeader = 16;  // words: a cache line

  /// A longer list takes more time than it saves.
  static int64_t most_pairs(int64_t in) { return (in + 9) / 10; }

  static int64_t panel_bytes(int64_t in) {
    const Panel panel(in, nullptr);
    return reinterpret_cast<intptr_t>(panel.rests + most_pairs(in) * kPanelColumns);
  }

  static void pack_piece(const int8_t* w, int64_t in, int64_t columns, void* piece) {
    for (int64_t first = 0; first < kColumnBlock; first += kPanelColumns) {
      const int64_t count = std::clamp<int64_t>(columns - first, 0, kPanelColumns);
      pack_panel(w + first * in, in, count, Panel(in, piece));
      piece = static_cast<char*>(piece) + panel_bytes(in);
    }
  }

  class Rows {
   public:
    Rows(int64_t in, const LinearInput& x, int64_t count)
        : in(in),
          stride(quantized_stride(in)),
          values(thread_scratch<int8_t>(Scratch::kUnsigned, 2 * count * stride + 2)),
          evens(reinterpret_cast<int16_t*>(values + count * stride)),
          input_(x),
          count_(count) {
      for (int64_t i = 0; i < count * stride; i += FASTBERT_VECTOR_BYTES) {
        // Added as unsigned numbers: 127 + 127 is none that an int8 has.
        const auto u = load_raw<UnsignedByteVec>(x.quantized + i) + static_cast<uint8_t>(127);
        store_raw(values + i, u);
        store_raw(evens + i / 2, reinterpret_cast<Int16Vec>(u) & static_cast<int16_t>(0xff));
      }
    }

    const WidenedKernel::Rows& widened() const {
      if (!widened_) widened_.emplace(in, input_, count_);
      return *widened_;
    }

    const int64_t in;
    const int64_t stride;
    int8_t* const values;  // u
    int16_t* const evens;  // u of the even k, and one more that the last load takes

   private:
    const LinearInput input_;
    const int64_t count_;
    mutable std::optional<WidenedKernel::Rows> widened_;
  };

  static void tile(const Rows& rows, int64_t first, int64_t count, const void* packed, Ahead& ahead,
                   int32_t (*sums)[kPanelColumns]) {
    const Panel panel(rows.in, packed);
    if (*panel.listed < 0) {
      return WidenedKernel::tile(rows.widened(), first, count, panel.words, ahead, sums);
    }
    tile_of<PairsKernel>(count)(rows, first, panel, ahead, sums[0]);
  }

  /// kRows rows from `first` on times one panel -> sums.
  template <int kRows>
  static void tile_rows(const Rows& rows, int64_t first, const Panel& panel, Ahead& ahead,
                        int32_t* sums) {
    constexpr int64_t L = kLanes<float>, P = kPanelColumns;
    const int64_t stride = rows.stride;
    const int8_t* x = rows.values + first * stride;
    const int32_t* words = panel.words;
    IntVec<float> acc[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = load_raw<IntVec<float>>(panel.start + j * L);
    }
    for_words<P>(0, word_count<Weight>(rows.in), ahead, [&](int64_t word) FASTBERT_INLINE_LAMBDA {
      IntVec<float> w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load_raw<IntVec<float>>(words + word * P + j * L);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const IntVec<float> four = IntVec<float>{} + load_raw<int32_t>(x + i * stride + word * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          acc[i][j] = dot4(acc[i][j], four, w[j]);
          settle(acc[i][j]);
        }
      }
    });
    // Both u come by broadcasts from memory, with a neighbour that the blend drops: to put them
    // together outside the vectors took as long as the products.
    const int16_t* evens = rows.evens + first * stride / 2;
    for (int64_t pair = 0; pair < *panel.listed; ++pair) {
      const int16_t* one = evens + panel.ks[2 * pair];
      const int16_t* other = evens + panel.ks[2 * pair + 1] - 1;
      const int32_t* rests = panel.rests + pair * P;
      Int16Vec w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load_raw<Int16Vec>(rests + j * L);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const IntVec<float> low = IntVec<float>{} + load_raw<int32_t>(one + i * stride / 2);
        const IntVec<float> high = IntVec<float>{} + load_raw<int32_t>(other + i * stride / 2);
        const Int16Vec two =
            alternate(reinterpret_cast<Int16Vec>(low), reinterpret_cast<Int16Vec>(high));
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          acc[i][j] = dot2(acc[i][j], two, w[j]);
          settle(acc[i][j]);
        }
      }
    }
    store_tile(acc, sums);
  }

 private:
  /// w (columns × in) -> panel.
  static void pack_panel(const int8_t* w, int64_t in, int64_t columns, const Panel& panel) {
    std::vector<int8_t> within(w, w + columns * in);
    std::vector<char> listed(std::max<int64_t>(in / 2, 2));  // even k, and the filler below
    std::fill(panel.start, panel.start + kPanelColumns, 0);
    for (int64_t column = 0; column < columns; ++column) {
      int8_t* const of_column = within.data() + column * in;
      int32_t sum = 0;
      for (int64_t k = 0; k < in; ++k) sum += of_column[k];
      panel.start[column] = -127 * sum;
      for (int64_t k = 0; k + 1 < in; k += 2) {
        const int32_t sum_of_pair = of_column[k] + of_column[k + 1];
        const int32_t excess = sum_of_pair - std::clamp(sum_of_pair, -129, 129);
        if (excess == 0) continue;
        // Both weights have its sign, and either can do without it.
        of_column[k] = static_cast<int8_t>(of_column[k] - excess);
        listed[k / 2] = 1;
      }
    }
    std::vector<int32_t> ks;
    for (int64_t k = 0; k < in / 2; ++k) {
      if (listed[k]) ks.push_back(static_cast<int32_t>(k));
    }
    const int64_t pairs = (static_cast<int64_t>(ks.size()) + 1) / 2;
    const bool fits = pairs <= most_pairs(in);
    *panel.listed = fits ? static_cast<int32_t>(pairs) : -1;
    pack_words<kPanelColumns>(fits ? within.data() : w, in, columns, kPanelColumns, panel.words);
    if (!fits) return;
    if (ks.size() % 2 != 0) ks.push_back(1);  // whose rest is 0, unless it is listed itself
    std::copy(ks.begin(), ks.end(), panel.ks);
    std::fill(panel.rests, panel.rests + pairs * kPanelColumns, 0);
    const auto rests = reinterpret_cast<int16_t*>(panel.rests);
    for (int64_t i = 0; i < 2 * pairs; ++i) {
      if (!listed[ks[i]]) continue;
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t at = column * in + 2 * ks[i];
        rests[i / 2 * 2 * kPanelColumns + 2 * column + i % 2] =
            static_cast<int16_t>(w[at] - within[at]);
      }
      listed[ks[i]] = 0;
    }
  }
};

}  // namespace fastbert::FASTBERT_ISA
