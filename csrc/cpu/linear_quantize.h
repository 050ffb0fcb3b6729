// Rows of fp32 to int8:
//
//   offset = (max_k x[k] + min_k x[k]) / 2        scale = (max_k x[k] − min_k x[k]) / 254
//   q[k] = clip(rint((x[k] − offset) · 1 / scale), ±127)
//
// or with one given scale for all rows, and no offset. rint rounds half to even. (With the offset a
// step is as fine as a row of int8 allows: after GELU, whose values are -0.17 at least, it is half
// of the symmetric one. It costs the Linear one addition an output.)
#pragma once

#include "microkernel.h"

namespace fastbert::FASTBERT_ISA {

FASTBERT_INLINE int64_t quantized_stride(int64_t in) { return round_up(in, 64); }

/// The least and the largest value of a row, and whether all of it is finite.
struct RowRange {
  float low, high;
  bool finite;
};

FASTBERT_INLINE RowRange row_range(const float* x, int64_t cols) {
  constexpr int64_t L = kLanes<float>;
  if (cols == 0) return {0, 0, true};
  constexpr int kChains = 4;
  Vec<float> low[kChains], high[kChains], poison[kChains] = {};
  for (int j = 0; j < kChains; ++j) low[j] = high[j] = splat<float>(x[0]);
  // min and max may pass over a NaN; its product with 0 stays NaN, like that of an infinity.
  const auto take = [&](int j, Vec<float> value) FASTBERT_INLINE_LAMBDA {
    low[j] = min<float>(low[j], value);
    high[j] = max<float>(high[j], value);
    poison[j] += value * 0.0f;
  };
  int64_t i = 0;
  for (; i + kChains * L <= cols; i += kChains * L) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) take(j, load<float>(x + i + j * L));
  }
  for_vectors<float>(cols - i, [&](int64_t at, auto lanes) FASTBERT_INLINE_LAMBDA {
    const Vec<float> value = load<float>(x + i + at, lanes);
    take(0, keep<float>(value, splat<float>(x[0]), lanes));
  });
  for (int j = 1; j < kChains; ++j) {
    low[0] = min<float>(low[0], low[j]);
    high[0] = max<float>(high[0], high[j]);
    poison[0] += poison[j];
  }
  return {-horizontal_max<float>(-low[0]), horizontal_max<float>(high[0]),
          horizontal_sum<float>(poison[0]) == 0};
}

/// clip(rint((x − offset) · inverse), ±127), in the low byte of each lane: from 1.5 · 2²³ on, floats
/// are integers, and an addition rounds to them.
FASTBERT_INLINE IntVec<float> quantize(Vec<float> x, float offset, float inverse) {
  constexpr float kRoundToInteger = 12582912.0f;
  const Vec<float> steps = (x - offset) * inverse;
  const Vec<float> clipped =
      max<float>(splat<float>(-127.0f), min<float>(splat<float>(127.0f), steps));
  return reinterpret_cast<IntVec<float>>(clipped + kRoundToInteger);
}

typedef int8_t ByteVec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
typedef uint8_t UnsignedByteVec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
typedef int8_t QuarterVec __attribute__((vector_size(FASTBERT_VECTOR_BYTES / 4)));

/// The low bytes of the lanes.
FASTBERT_INLINE QuarterVec low_bytes(IntVec<float> value) {
#if defined(__AVX512F__)
  return reinterpret_cast<QuarterVec>(
      _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(value)));
#else
  ByteVec fourth = {};
  for (int byte = 0; byte < FASTBERT_VECTOR_BYTES / 4; ++byte) fourth[byte] = 4 * byte;
  const ByteVec gathered = __builtin_shuffle(reinterpret_cast<ByteVec>(value), fourth);
  QuarterVec bytes;
  __builtin_memcpy(&bytes, &gathered, sizeof bytes);
  return bytes;
#endif
}

inline void quantize_rows(const float* x, int64_t rows, int64_t cols, float fixed_scale, int8_t* q,
                          float* scale, float* offset) {
  constexpr float kLargest = 3.40282347e38f;
  const int64_t stride = quantized_stride(cols);
  for (int64_t row = 0; row < rows; ++row, x += cols, q += stride) {
    const RowRange range = row_range(x, cols);
    const float half = 0.5f * range.high - 0.5f * range.low;
    const bool fixed = fixed_scale > 0;
    scale[row] = !range.finite ? __builtin_nanf("") : fixed ? fixed_scale : half / 127.0f;
    const float center = fixed || !range.finite ? 0.0f : 0.5f * range.high + 0.5f * range.low;
    offset[row] = center;
    const float inverse = fixed ? 1.0f / fixed_scale : 127.0f / half;
    // A row of one value, or of values so close that the reciprocal overflows, is its offset; one
    // with infinities or NaN is zeros, and its scale makes every output NaN.
    if (!range.finite || !(inverse <= kLargest)) {
      __builtin_memset(q, 0, stride);
      continue;
    }
    for_vectors<float>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      // A last part may fill its vector: what it writes behind the row is padding.
      store_raw(q + i, low_bytes(quantize(load<float>(x + i, lanes), center, inverse)));
    });
    __builtin_memset(q + cols, 0, stride - cols);
  }
}

}  // namespace fastbert::FASTBERT_ISA
