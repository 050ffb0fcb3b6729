// Vectors of one ISA, written with GCC vector extensions: the including translation unit defines
// FASTBERT_ISA (a namespace name) and FASTBERT_VECTOR_BYTES (64, 32 or 16) and is compiled with that
// ISA's flags. Everything here is in that namespace and always inlined: no two units share a symbol.
//
// S below is the type of the arithmetic (float or double), T the type in memory (float, bf16, double).
#pragma once

#include <cstdint>

#include "types.h"

#if !defined(FASTBERT_ISA) || !defined(FASTBERT_VECTOR_BYTES)
#error "define FASTBERT_ISA and FASTBERT_VECTOR_BYTES before including vec.h"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTBERT_INLINE inline __attribute__((always_inline))
// After a lambda's parameter list: GCC must not outline a loop body that is used in several places.
#define FASTBERT_INLINE_LAMBDA __attribute__((always_inline))

namespace fastbert::FASTBERT_ISA {

template <class S>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int64_t lanes = FASTBERT_VECTOR_BYTES / 4;
  using Index = int32_t;
  typedef float Vec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  typedef Index Int __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(FASTBERT_VECTOR_BYTES / 2)));
};

template <>
struct Simd<double> {
  static constexpr int64_t lanes = FASTBERT_VECTOR_BYTES / 8;
  using Index = int64_t;
  typedef double Vec __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  typedef Index Int __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  typedef float Half __attribute__((vector_size(FASTBERT_VECTOR_BYTES / 2)));
};

template <class S>
using Vec = typename Simd<S>::Vec;
template <class S>
using IntVec = typename Simd<S>::Int;
template <class S>
constexpr int64_t kLanes = Simd<S>::lanes;

using BitsVec = Simd<float>::Bits;

/// The arithmetic type of a storage type: fp32 for fp32 and bf16, fp64 for fp64.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

/// How many lanes of a vector are real: all of them, or the first `count` (0 < count < lanes).
struct Whole {};
struct Part {
  int64_t count;
};

template <class S>
FASTBERT_INLINE Vec<S> splat(S value) {
  return Vec<S>{} + value;
}

// ---------------------------------------------------------------------------- scalar conversions

FASTBERT_INLINE float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}
FASTBERT_INLINE float widen(float value) { return value; }
FASTBERT_INLINE double widen(double value) { return value; }

/// Rounds to nearest even; a NaN stays a NaN (its sign and upper payload kept, made quiet).
template <class T, class S>
FASTBERT_INLINE T narrow(S value) {
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return T{static_cast<uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16)};
  } else {
    return static_cast<T>(value);
  }
}

// ------------------------------------------------------------------------------ loads and stores

/// Unaligned copies between memory and a vector type.
template <class V>
FASTBERT_INLINE V load_raw(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
FASTBERT_INLINE void store_raw(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

/// 16-bit lanes as the upper halves of 32-bit ones, and back. What the compiler makes of shifts and
/// its own conversions of whole vectors takes two to six times the instructions.
FASTBERT_INLINE BitsVec from_upper_halves(Simd<float>::Half half) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitsVec>(
             _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(half)))
         << 16;
#elif defined(__AVX2__)
  return reinterpret_cast<BitsVec>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half))) << 16;
#else
  return __builtin_convertvector(half, BitsVec) << 16;
#endif
}
FASTBERT_INLINE Simd<float>::Half upper_halves(BitsVec bits) {
  using Half = Simd<float>::Half;
#if defined(__AVX512BW__)
  typedef uint16_t Words __attribute__((vector_size(FASTBERT_VECTOR_BYTES)));
  Words odd = {};
  for (int word = 0; word < 16; ++word) odd[word] = 2 * word + 1;
  const Words gathered = __builtin_shuffle(reinterpret_cast<Words>(bits), odd);
  Half half;
  __builtin_memcpy(&half, &gathered, sizeof half);
  return half;
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits >> 16), __m256i{});
  return reinterpret_cast<Half>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  return __builtin_convertvector(bits >> 16, Half);
#endif
}

/// kLanes<S> consecutive elements of type T as a Vec<S>; `from` needs no alignment.
template <class S, class T>
FASTBERT_INLINE Vec<S> load(const T* from, Whole = {}) {
  using Half = typename Simd<S>::Half;
  if constexpr (sizeof(T) == sizeof(S)) {
    return load_raw<Vec<S>>(from);
  } else if constexpr (sizeof(T) == 2) {
    return reinterpret_cast<Vec<S>>(from_upper_halves(load_raw<Half>(from)));
  } else {
    return __builtin_convertvector(load_raw<Half>(from), Vec<S>);
  }
}

/// Stores kLanes<S> elements, rounded to T (nearest even).
template <class S, class T>
FASTBERT_INLINE void store(T* to, Vec<S> value, Whole = {}) {
  using Half = typename Simd<S>::Half;
  if constexpr (sizeof(T) == sizeof(S)) {
    store_raw(to, value);
  } else if constexpr (sizeof(T) == 2) {
    const auto bits = reinterpret_cast<BitsVec>(value);
    const auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const auto kept = value != value ? bits | 0x400000u : rounded;
    store_raw(to, upper_halves(kept));
  } else {
    store_raw(to, __builtin_convertvector(value, Half));
  }
}

/// The first `part.count` elements; the other lanes are 0 and memory behind them is not touched.
template <class S, class T>
FASTBERT_INLINE Vec<S> load(const T* from, Part part) {
  T buffer[kLanes<S>] = {};
  __builtin_memcpy(buffer, from, part.count * sizeof(T));
  return load<S>(buffer);
}
template <class S, class T>
FASTBERT_INLINE void store(T* to, Vec<S> value, Part part) {
  T buffer[kLanes<S>];
  store<S>(buffer, value);
  __builtin_memcpy(to, buffer, part.count * sizeof(T));
}

/// What a store to T followed by a load gives.
template <class T, class S>
FASTBERT_INLINE Vec<S> round_to(Vec<S> value) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return value;
  } else {
    T buffer[kLanes<S>];
    store<S>(buffer, value);
    return load<S>(buffer);
  }
}

// ----------------------------------------------------------------------------------------- lanes

/// 0, 1, 2, …
template <class S>
FASTBERT_INLINE IntVec<S> lane_index() {
  IntVec<S> index = {};
  for (int64_t lane = 0; lane < kLanes<S>; ++lane) index[lane] = lane;
  return index;
}

/// `value` in the real lanes, `fill` in the others.
template <class S>
FASTBERT_INLINE Vec<S> keep(Vec<S> value, Vec<S>, Whole) {
  return value;
}
template <class S>
FASTBERT_INLINE Vec<S> keep(Vec<S> value, Vec<S> fill, Part part) {
  return lane_index<S>() < static_cast<typename Simd<S>::Index>(part.count) ? value : fill;
}

template <class S>
FASTBERT_INLINE Vec<S> abs(Vec<S> value) {
  constexpr auto kAllButSign = static_cast<typename Simd<S>::Index>(~0ull >> (65 - 8 * sizeof(S)));
  return reinterpret_cast<Vec<S>>(reinterpret_cast<IntVec<S>>(value) & kAllButSign);
}

/// Lane by lane; b where either is NaN. (The instructions do just that; the compiler, for fear of
/// NaN and of signed zeros, makes a comparison and a blend of it.)
template <class S>
FASTBERT_INLINE Vec<S> max(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_max_ps(a, b);
#endif
  return a > b ? a : b;
}
template <class S>
FASTBERT_INLINE Vec<S> min(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_min_ps(a, b);
#endif
  return a < b ? a : b;
}

/// Lane by lane, correctly rounded; NaN below 0.
FASTBERT_INLINE Vec<float> sqrt(Vec<float> value) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, value);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(value);
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

/// Sum and maximum over the lanes, by a tree of fixed shape.
template <class S>
FASTBERT_INLINE S horizontal_sum(Vec<S> value) {
  for (typename Simd<S>::Index half = kLanes<S> / 2; half > 0; half /= 2) {
    value += __builtin_shuffle(value, lane_index<S>() ^ half);
  }
  return value[0];
}
template <class S>
FASTBERT_INLINE S horizontal_max(Vec<S> value) {
  for (typename Simd<S>::Index half = kLanes<S> / 2; half > 0; half /= 2) {
    value = max<S>(value, __builtin_shuffle(value, lane_index<S>() ^ half));
  }
  return value[0];
}

// ----------------------------------------------------------------------------------------- loops

/// body(i, lanes) for the columns 0 … n in steps of one vector; `lanes` is Whole or Part.
template <class S, class Body>
FASTBERT_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

/// K sums over n columns in a fixed order.
template <class S, int K>
struct Sums {
  S total[K];
};

/// body(i, lanes, acc) adds to acc[0] … acc[K - 1]; four sets of accumulators hide the latency of
/// the additions. Lanes that are not real must add 0.
template <class S, int K, class Body>
FASTBERT_INLINE Sums<S, K> accumulate(int64_t n, Body body) {
  constexpr int64_t L = kLanes<S>;
  Vec<S> acc[4][K] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    body(i, Whole{}, acc[0]);
    body(i + L, Whole{}, acc[1]);
    body(i + 2 * L, Whole{}, acc[2]);
    body(i + 3 * L, Whole{}, acc[3]);
  }
  for (; i + L <= n; i += L) body(i, Whole{}, acc[0]);
  if (i < n) body(i, Part{n - i}, acc[1]);
  Sums<S, K> sums;
  for (int k = 0; k < K; ++k) {
    sums.total[k] = horizontal_sum<S>((acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k]));
  }
  return sums;
}

// --------------------------------------------------------------------------------- exponentials

/// The scaling of exp and exp2. `shifted` is kRounder + n with n an integer in [−126, 129], and
/// `twice` is 2 · 2^x / 2^n. Doubling that moves the exponent by one, so that n = 128 needs no second
/// step; n = −126 gives 0 (subnormal results are flushed) and n = 129 infinity.
constexpr float kRounder = 12582912.0f + 126.0f;  // 1.5 · 2²³ + exponent bias − 1

FASTBERT_INLINE Vec<float> scale_by_power(Vec<float> twice, Vec<float> shifted) {
  // The low byte of `shifted` is n − 1 + exponent bias.
  return twice * reinterpret_cast<Vec<float>>(reinterpret_cast<BitsVec>(shifted) << 23);
}

/// 2 · 2^r for |r| ≤ 1/2, by a minimax polynomial of degree 6 (relative error 1.6e-8 as rounded).
FASTBERT_INLINE Vec<float> twice_exp2_fraction(Vec<float> r) {
  Vec<float> p = splat<float>(3.0706514e-4f);
  p = p * r + 2.6798006e-3f;
  p = p * r + 1.9236878e-2f;
  p = p * r + 0.11100664f;
  p = p * r + 0.48045295f;
  p = p * r + 1.3862944f;
  return p * r + 2.0f;
}

/// 2^x. fp32: about 1 ulp for x ≥ −125.5, exactly 0 below, inf from 128 on, NaN for NaN.
FASTBERT_INLINE Vec<float> exp2(Vec<float> x) {
  x = min<float>(splat<float>(129.0f), max<float>(splat<float>(-126.0f), x));
  const Vec<float> shifted = x + kRounder;
  const Vec<float> r = x - (shifted - kRounder);
  return scale_by_power(twice_exp2_fraction(r), shifted);
}

/// e^x, as exp2. x = n · ln 2 + r, with ln 2 in two parts, the first so short that n times it is
/// exact; 2 e^r by a minimax polynomial (relative error 3.1e-9).
FASTBERT_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  x = min<float>(splat<float>(89.0f), max<float>(splat<float>(-87.5f), x));
  const Vec<float> shifted = x * kLog2E + kRounder;
  const Vec<float> n = shifted - kRounder;
  Vec<float> r = x - n * kLn2High;
  r = r - n * kLn2Low;
  Vec<float> p = splat<float>(2 * 1.3814539e-3f);
  p = p * r + 2 * 8.368745e-3f;
  p = p * r + 2 * 4.1668390e-2f;
  p = p * r + 2 * 0.16666521f;
  p = p * r + 2 * 0.49999994f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return scale_by_power(p, shifted);
}

/// fp64 is the path of gradient checks, not of speed: the C library, lane by lane.
FASTBERT_INLINE Vec<double> exp2(Vec<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp2(x[lane]);
  return x;
}
FASTBERT_INLINE Vec<double> exp(Vec<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

}  // namespace fastbert::FASTBERT_ISA
