// Dropout masks from a counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), the same words in every backend.
//
//   key = (seed low, seed high), counter = (col / 4, row, offset, plane), word = col % 4;
//   an element is kept iff word >= floor(p · 2³²), and then multiplied by 1 / (1 − p).
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastbert::FASTBERT_ISA {

/// Everything of a dropout site that does not change with row and column.
struct Dropout {
  uint32_t key[2];
  uint32_t offset;
  uint32_t threshold;
  double scale;  // of what is kept, 1 / (1 − p)
  bool active;   // false for p = 0: all is kept and nothing is computed
};

FASTBERT_INLINE Dropout make_dropout(double p, uint64_t seed, uint32_t offset) {
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          offset,
          static_cast<uint32_t>(p * 4294967296.0),
          1.0 / (1.0 - p),
          p > 0.0};
}

/// The columns that one call of the generator serves: four words a lane.
constexpr int64_t kPhiloxColumns = 4 * kLanes<float>;

/// Room for the mask of `cols` columns as dropout_row() writes it: whole groups of kPhiloxColumns.
constexpr int64_t padded_columns(int64_t cols) {
  return (cols + kPhiloxColumns - 1) / kPhiloxColumns * kPhiloxColumns;
}

/// The 64-bit products of the even lanes of `a` with `factor`.
FASTBERT_INLINE BitsVec multiply_even(BitsVec a, BitsVec factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitsVec>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a),
                                                          reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<BitsVec>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#else
  typedef uint64_t Wide __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  return reinterpret_cast<BitsVec>((reinterpret_cast<Wide>(a) & 0xffffffffu) *
                                   (reinterpret_cast<Wide>(factor) & 0xffffffffu));
#endif
}

/// Both halves of the 64-bit products of all lanes of `a` with `factor`.
FASTBERT_INLINE void multiply_wide(BitsVec a, uint32_t factor, BitsVec* high, BitsVec* low) {
  typedef uint64_t Wide __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  const BitsVec factors = BitsVec{} + factor;
  const BitsVec even = multiply_even(a, factors);
  const BitsVec odd =
      multiply_even(reinterpret_cast<BitsVec>(reinterpret_cast<Wide>(a) >> 32), factors);
  const IntVec<float> lane = lane_index<float>();
  const IntVec<float> low_words = (lane & ~1) + (lane & 1) * static_cast<int>(kLanes<float>);
  *low = __builtin_shuffle(even, odd, low_words);
  *high = __builtin_shuffle(even, odd, low_words + 1);
}

/// Ten rounds on one counter a lane; word[0 … 3] goes in as the counter and comes out random.
FASTBERT_INLINE void philox(BitsVec word[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    BitsVec high0, low0, high1, low1;
    multiply_wide(word[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(word[2], 0xCD9E8D57u, &high1, &low1);
    word[0] = high1 ^ word[1] ^ key0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key1;
    word[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

/// Transposes the 4 × 4 matrices that four vectors hold in each of their 128-bit blocks.
FASTBERT_INLINE void transpose_blocks(Vec<float> v[4]) {
  constexpr int32_t L = kLanes<float>;
  const IntVec<float> lane = lane_index<float>();
  const IntVec<float> block = lane & ~3;
  const IntVec<float> place = lane & 3;
  const IntVec<float> singles = block + place / 2 + place % 2 * L;  // a0 b0 a1 b1
  const IntVec<float> pairs = block + place % 2 + place / 2 * L;    // a0 a1 b0 b1
  const Vec<float> low01 = __builtin_shuffle(v[0], v[1], singles);
  const Vec<float> high01 = __builtin_shuffle(v[0], v[1], singles + 2);
  const Vec<float> low23 = __builtin_shuffle(v[2], v[3], singles);
  const Vec<float> high23 = __builtin_shuffle(v[2], v[3], singles + 2);
  v[0] = __builtin_shuffle(low01, low23, pairs);
  v[1] = __builtin_shuffle(low01, low23, pairs + 2);
  v[2] = __builtin_shuffle(high01, high23, pairs);
  v[3] = __builtin_shuffle(high01, high23, pairs + 2);
}

/// The mask of the columns [first, first + cols) of one row: 1 where an element is kept, else 0.
/// `first` is a multiple of 4; `out` has room for padded_columns(cols).
FASTBERT_INLINE void dropout_row(const Dropout& dropout, uint32_t row, uint32_t plane,
                                 int64_t first, int64_t cols, float* out) {
  constexpr int64_t L = kLanes<float>;
  // With the counters dealt to the 128-bit blocks in turn, transposing inside the blocks leaves the
  // words of all counters in column order.
  const IntVec<float> lane = lane_index<float>();
  const BitsVec counter_of_lane = reinterpret_cast<BitsVec>(lane % 4 * (L / 4) + lane / 4);
  for (int64_t col = 0; col < cols; col += kPhiloxColumns) {
    BitsVec word[4] = {counter_of_lane + static_cast<uint32_t>((first + col) / 4), BitsVec{} + row,
                       BitsVec{} + dropout.offset, BitsVec{} + plane};
    philox(word, dropout.key[0], dropout.key[1]);
    Vec<float> keep_word[4];
    for (int w = 0; w < 4; ++w) {
      keep_word[w] = word[w] >= dropout.threshold ? splat<float>(1.0f) : Vec<float>{};
    }
    transpose_blocks(keep_word);
    for (int w = 0; w < 4; ++w) store<float>(out + col + w * L, keep_word[w]);
  }
}

/// The calling thread's room for the mask of one row; nullptr without dropout.
FASTBERT_INLINE float* dropout_scratch(const Dropout& dropout, int64_t cols) {
  return dropout.active ? thread_scratch<float>(Scratch::kMask, padded_columns(cols)) : nullptr;
}

}  // namespace fastbert::FASTBERT_ISA
