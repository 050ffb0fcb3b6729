// Rows of fp32 to int8, symmetric:
//
//   x_scale[t] = max_k |x[t, k]| / 127      q[t, k] = clip(rint(x[t, k] · 1 / x_scale[t]), ±127)
//
// or with one given scale for all rows. rint rounds half to even.
#pragma once

#include "microkernel.h"

namespace fastbert::FASTBERT_ISA {

FASTBERT_INLINE int64_t quantized_stride(int64_t in) { return round_up(in, 64); }

/// |x| as bits, which order as |x| does, with infinity and NaN above all numbers.
FASTBERT_INLINE IntVec<float> magnitude_bits(Vec<float> x) {
  return reinterpret_cast<IntVec<float>>(abs<float>(x));
}
constexpr int32_t kInfinityBits = 0x7f800000;

FASTBERT_INLINE IntVec<float> larger(IntVec<float> a, IntVec<float> b) { return a > b ? a : b; }

FASTBERT_INLINE int32_t largest_lane(IntVec<float> value) {
  for (int32_t half = kLanes<float> / 2; half > 0; half /= 2) {
    value = larger(value, __builtin_shuffle(value, lane_index<float>() ^ half));
  }
  return value[0];
}

/// Bits of max |x| over a row.
FASTBERT_INLINE int32_t row_magnitude(const float* x, int64_t cols) {
  constexpr int64_t L = kLanes<float>;
  IntVec<float> most[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= cols; i += 4 * L) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      most[j] = larger(most[j], magnitude_bits(load<float>(x + i + j * L)));
    }
  }
  for_vectors<float>(cols - i, [&](int64_t j, auto lanes) FASTBERT_INLINE_LAMBDA {
    most[0] = larger(most[0], magnitude_bits(load<float>(x + i + j, lanes)));
  });
  return largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

/// clip(rint(x · inverse), ±127), in the low byte of each lane: from 1.5 · 2²³ on, floats are
/// integers, and an addition rounds to them.
FASTBERT_INLINE IntVec<float> quantize(Vec<float> x, float inverse) {
  constexpr float kRoundToInteger = 12582912.0f;
  const Vec<float> clipped =
      max<float>(splat<float>(-127.0f), min<float>(splat<float>(127.0f), x * inverse));
  return reinterpret_cast<IntVec<float>>(clipped + kRoundToInteger);
}

typedef int8_t ByteVec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
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
                          float* scale) {
  constexpr int64_t L = kLanes<float>;
  const int64_t stride = quantized_stride(cols);
  for (int64_t row = 0; row < rows; ++row, x += cols, q += stride) {
    const int32_t bits = row_magnitude(x, cols);
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    scale[row] = fixed_scale > 0 ? fixed_scale : magnitude / 127.0f;
    const float inverse = fixed_scale > 0 ? 1.0f / fixed_scale : 127.0f / magnitude;
    if (bits >= kInfinityBits) scale[row] = __builtin_nanf("");
    // A row of zeros, or of values so small that the reciprocal overflows, counts as zeros; one
    // with infinities or NaN too: its scale makes every output NaN.
    if (bits >= kInfinityBits || bits == 0 || inverse > 3.40282347e38f) {
      __builtin_memset(q, 0, stride);
      continue;
    }
    for_vectors<float>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      const QuarterVec bytes = low_bytes(quantize(load<float>(x + i, lanes), inverse));
      // A last part may fill its vector: lanes that are not real are 0, and so is what pads the
      // row.
      store_raw(q + i, bytes);
    });
    const int64_t written = round_up(cols, L);
    __builtin_memset(q + written, 0, stride - written);
  }
}

}  // namespace fastbert::FASTBERT_ISA
