// int8 Linear for processors without vpdpbusd: vpmaddwd multiplies pairs of 16-bit integers and
// adds the two products in 32 bits, where nothing can overflow. (vpmaddubsw takes bytes, but wants
// one operand unsigned and saturates its sums at 16 bits.)
//
// Bytes become 16-bit integers by shifts alone, in the order that these leave: of the four k in a
// word, the even ones are one pair and the odd ones another.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "linear_pack.h"
#include "linear_quantize.h"

namespace fastbert::FASTBERT_ISA {

typedef int16_t Int16Vec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));

FASTBERT_INLINE Int16Vec even_bytes(Int16Vec bytes) { return bytes << 8 >> 8; }
FASTBERT_INLINE Int16Vec odd_bytes(Int16Vec bytes) { return bytes >> 8; }

/// sum + Σ of two products of 16-bit integers.
FASTBERT_INLINE IntVec<float> dot2(IntVec<float> sum, Int16Vec a, Int16Vec b) {
#if FASTBERT_VECTOR_BYTES == 64
  return sum + reinterpret_cast<IntVec<float>>(
                   _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif FASTBERT_VECTOR_BYTES == 32
  return sum + reinterpret_cast<IntVec<float>>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<IntVec<float>>(
                   _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const auto first = [](Int16Vec v) { return reinterpret_cast<IntVec<float>>(v) << 16 >> 16; };
  const auto second = [](Int16Vec v) { return reinterpret_cast<IntVec<float>>(v) >> 16; };
  return sum + first(a) * first(b) + second(a) * second(b);
#endif
}

struct WidenedKernel {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int kVectors = kPanelVectors;
  static constexpr int64_t kPanelColumns = kVectors * kLanes<float>;
  static constexpr int64_t kTileRows = 6;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kStepBytes = 4 * kPanelColumns;

  static int64_t panel_bytes(int64_t in) { return packed_bytes<Weight>(kPanelColumns, in); }
  static void pack_piece(const int8_t* w, int64_t in, int64_t columns, void* piece) {
    pack_words<kPanelColumns>(w, in, columns, kColumnBlock, piece);
  }

  /// Each row widened: its pairs of even k, then its pairs of odd k, `stride` bytes each.
  struct Rows {
    Rows(int64_t in, const LinearInput& x, int64_t count)
        : words(word_count<Weight>(in)),
          stride(quantized_stride(in)),
          values(thread_scratch<int8_t>(Scratch::kLinear, 2 * count * stride)) {
      for (int64_t i = 0; i < count * stride; i += FASTBERT_VECTOR_BYTES) {
        const auto bytes = load_raw<Int16Vec>(x.quantized + i);
        int8_t* to = values + i / stride * 2 * stride + i % stride;
        store_raw(to, even_bytes(bytes));
        store_raw(to + stride, odd_bytes(bytes));
      }
    }
    const int64_t words;
    const int64_t stride;
    int8_t* const values;
  };

  static void tile(const Rows& rows, int64_t first, int64_t count, const void* panel, Ahead& ahead,
                   int32_t (*sums)[kPanelColumns]) {
    tile_of<WidenedKernel>(count)(rows, first, static_cast<const int32_t*>(panel), ahead, sums[0]);
  }

  template <int kRows>
  static void tile_rows(const Rows& rows, int64_t first, const int32_t* panel, Ahead& ahead,
                        int32_t* sums) {
    constexpr int64_t L = kLanes<float>, P = kPanelColumns;
    const int64_t stride = rows.stride;
    const int8_t* x = rows.values + first * 2 * stride;
    IntVec<float> acc[kRows][kVectors] = {};
    for_words<P>(0, rows.words, ahead, [&](int64_t word) FASTBERT_INLINE_LAMBDA {
      const auto add = [&](const int8_t* half, auto widen) FASTBERT_INLINE_LAMBDA {
        Int16Vec w[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          w[j] = widen(load_raw<Int16Vec>(panel + word * P + j * L));
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          const auto pair = load_raw<int32_t>(half + i * 2 * stride + word * 4);
          const auto broadcast = reinterpret_cast<Int16Vec>(IntVec<float>{} + pair);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            acc[i][j] = dot2(acc[i][j], w[j], broadcast);
            settle(acc[i][j]);
          }
        }
      };
      add(x, even_bytes);
      add(x + stride, odd_bytes);
    });
    store_tile(acc, sums);
  }
};

}  // namespace fastbert::FASTBERT_ISA
