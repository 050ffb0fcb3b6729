// int8 Linear on vpdpbusd, which adds four products of unsigned by signed bytes to each lane.
//
// Weights are what is made unsigned: with w + 128 in memory,
//
//   Σ_k x[k] w[k] = Σ_k x[k] (w[k] + 128) − 128 Σ_k x[k]
//
// and the last term, one number a row, is what the sums start from. Sums wrap around modulo 2³², so
// that nothing on the way can overflow.
#pragma once

#include "linear_pack.h"
#include "linear_quantize.h"

namespace fastbert::FASTBERT_ISA {

/// sum + Σ of four products of bytes: `u` unsigned, `s` signed.
FASTBERT_INLINE IntVec<float> dot4(IntVec<float> sum, IntVec<float> u, IntVec<float> s) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<IntVec<float>>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s)));
#else
  return reinterpret_cast<IntVec<float>>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(u), reinterpret_cast<__m256i>(s)));
#endif
}

struct VnniKernel {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int kVectors = kPanelVectors;
  static constexpr int64_t kPanelColumns = kVectors * kLanes<float>;
  static constexpr int64_t kTileRows = 6;
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kStepBytes = 4 * kPanelColumns;

  static int64_t panel_bytes(int64_t in) { return packed_bytes<Weight>(kPanelColumns, in); }
  static void pack_piece(const int8_t* w, int64_t in, int64_t columns, void* piece) {
    pack_words<kPanelColumns>(w, in, columns, kColumnBlock, piece);
    uint8_t* bytes = static_cast<uint8_t*>(piece);
    const int64_t count = packed_bytes<Weight>(kColumnBlock, in);
    for (int64_t i = 0; i < count; ++i) bytes[i] ^= 0x80;
  }

  struct Rows {
    Rows(int64_t in, const LinearInput& x, int64_t count)
        : words(word_count<Weight>(in)), stride(quantized_stride(in)), values(x.quantized) {
      const IntVec<float> ones = IntVec<float>{} + 0x01010101;
      for (int64_t row = 0; row < count; ++row) {
        IntVec<float> sum = {};
        for (int64_t k = 0; k < stride; k += FASTBERT_VECTOR_BYTES) {
          sum = dot4(sum, ones, load_raw<IntVec<float>>(values + row * stride + k));
        }
        for (int32_t half = kLanes<float> / 2; half > 0; half /= 2) {
          sum += __builtin_shuffle(sum, lane_index<float>() ^ half);
        }
        start[row] = -128 * sum[0];
      }
    }
    const int64_t words;
    const int64_t stride;
    const int8_t* const values;
    int32_t start[kBlockRows];
  };

  static void tile(const Rows& rows, int64_t first, int64_t count, const void* panel, Ahead& ahead,
                   int32_t (*sums)[kPanelColumns]) {
    tile_of<VnniKernel>(count)(rows, first, static_cast<const int32_t*>(panel), ahead, sums[0]);
  }

  template <int kRows>
  static void tile_rows(const Rows& rows, int64_t first, const int32_t* panel, Ahead& ahead,
                        int32_t* sums) {
    constexpr int64_t L = kLanes<float>, P = kPanelColumns;
    const int64_t stride = rows.stride;
    const int8_t* x = rows.values + first * stride;
    IntVec<float> acc[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = IntVec<float>{} + rows.start[first + i];
    }
    for_words<P>(0, rows.words, ahead, [&](int64_t word) FASTBERT_INLINE_LAMBDA {
      IntVec<float> w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load_raw<IntVec<float>>(panel + word * P + j * L);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const IntVec<float> four = IntVec<float>{} + load_raw<int32_t>(x + i * stride + word * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = dot4(acc[i][j], w[j], four);
      }
    });
    store_tile(acc, sums);
  }
};

}  // namespace fastbert::FASTBERT_ISA
