// y = gelu(x + bias) and its gradient (Hendrycks & Gimpel 2016).
//
//   erf   gelu(u) = u Φ(u) = max(u, 0) − |u| Φ(−|u|)     Φ the normal distribution function
//   tanh  gelu(u) = u σ(2w)      w = √(2/π) (u + 0.044715 u³), as (1 + tanh w) / 2 = σ(2w)
//
// Neither 1 + erf nor 1 + tanh is formed for negative u, where they cancel: gelu(−5) keeps its
// digits.
#pragma once

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

/// gelu(u) and gelu'(u).
template <class S>
struct Gelu {
  Vec<S> value;
  Vec<S> slope;
};

/// exp(−a²/2) and Φ(−a), for a ≥ 0 that is at most kFarTail<S>, where both become 0.
template <class S>
struct NormalTail {
  Vec<S> density;
  Vec<S> phi;
};
template <class S>
constexpr S kFarTail = static_cast<S>(sizeof(S) == 4 ? 13.22 : 39.0);

/// exp(−a²/2) = 2^x, x = −a² log2(e)/2, and Φ(−a) = 2^x Q(t), t = 1 / (1 + 0.3 a), with a polynomial
/// Q that is minimax in relative error (8e-8 as rounded).
FASTBERT_INLINE NormalTail<float> normal_tail(Vec<float> a) {
  constexpr float kHalfLog2E = 0.72134752f;
  const Vec<float> squared = a * a;
  // Fused multiply-adds keep the product exact where the ISA has them.
  const Vec<float> shifted = kRounder - kHalfLog2E * squared;
  const Vec<float> r = -(kHalfLog2E * squared) - (shifted - kRounder);
  const Vec<float> density = scale_by_power(twice_exp2_fraction(r), shifted);
  const Vec<float> t = 1.0f / (1.0f + 0.3f * a);
  Vec<float> q = splat<float>(0.03831174f);
  q = q * t - 0.16884215f;
  q = q * t + 0.22798976f;
  q = q * t - 0.075738505f;
  q = q * t + 0.14200404f;
  q = q * t + 0.09491042f;
  q = q * t + 0.12186214f;
  q = q * t + 0.119495876f;
  q = q * t + 6.687003e-06f;
  return {density, density * q};
}
FASTBERT_INLINE NormalTail<double> normal_tail(Vec<double> a) {
  constexpr double kSqrtHalf = 0.70710678118654752;
  NormalTail<double> tail = {};
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    tail.density[lane] = __builtin_exp(-0.5 * a[lane] * a[lane]);
    tail.phi[lane] = 0.5 * __builtin_erfc(kSqrtHalf * a[lane]);
  }
  return tail;
}

template <class S>
FASTBERT_INLINE Gelu<S> gelu_erf(Vec<S> u) {
  constexpr S kInverseSqrt2Pi = static_cast<S>(0.39894228040143268);
  const Vec<S> a = min<S>(splat<S>(kFarTail<S>), abs<S>(u));
  const NormalTail<S> tail = normal_tail(a);
  const Vec<S> phi = u < 0 ? tail.phi : 1 - tail.phi;
  return {max<S>(Vec<S>{}, u) - a * tail.phi, phi + u * (tail.density * kInverseSqrt2Pi)};
}

template <class S>
FASTBERT_INLINE Gelu<S> gelu_tanh(Vec<S> u) {
  constexpr S kCubic = static_cast<S>(0.044715);
  constexpr S kTwice = static_cast<S>(2 * 0.79788456080286536);  // 2 √(2/π)
  constexpr S kTwiceLog2E = static_cast<S>(2 * 0.79788456080286536 * 1.4426950408889634);
  // Beyond ±32 σ is 0 or 1 in any precision; the cube of a larger u could overflow.
  const Vec<S> v = max<S>(splat<S>(-32), min<S>(splat<S>(32), u));
  const Vec<S> squared = v * v;
  const Vec<S> exponent = v * (kTwiceLog2E + kTwiceLog2E * kCubic * squared);  // 2w log2(e)
  const Vec<S> e = exp2(min<S>(exponent, -exponent));
  const Vec<S> larger = 1 / (1 + e);  // σ(|2w|)
  const Vec<S> smaller = e * larger;  // σ(−|2w|)
  const Vec<S> sigma = exponent < 0 ? smaller : larger;
  return {u * sigma, sigma + v * larger * smaller * (kTwice + 3 * kTwice * kCubic * squared)};
}

template <class S>
FASTBERT_INLINE Gelu<S> gelu(Vec<S> u, bool tanh) {
  return tanh ? gelu_tanh<S>(u) : gelu_erf<S>(u);
}

inline void bias_gelu_fwd(const void* x_ptr, const void* bias_ptr, int64_t rows, int64_t cols,
                          bool tanh, void* y_ptr, DType dtype, DType vector_dtype,
                          int num_threads) {
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const T* x = static_cast<const T*>(x_ptr);
    const V* bias = static_cast<const V*>(bias_ptr);
    T* y = static_cast<T*>(y_ptr);

    parallel_for(rows, row_grain(cols), num_threads, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
          Vec<S> u = load<S>(x + row * cols + i, lanes);
          if (bias != nullptr) u += load<S>(bias + i, lanes);
          store<S>(y + row * cols + i, gelu<S>(u, tanh).value, lanes);
        });
      }
    });
  });
}

inline void bias_gelu_bwd(const void* dy_ptr, const void* x_ptr, const void* bias_ptr, int64_t rows,
                          int64_t cols, bool tanh, void* dx_ptr, void* dbias_ptr, DType dtype,
                          DType vector_dtype, int num_threads) {
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const T* dy = static_cast<const T*>(dy_ptr);
    const T* x = static_cast<const T*>(x_ptr);
    const V* bias = static_cast<const V*>(bias_ptr);
    T* dx = static_cast<T*>(dx_ptr);
    V* dbias = static_cast<V*>(dbias_ptr);

    const RowBlocks blocks(rows);
    const ColumnSums<S, 1> sums(blocks, cols);
    parallel_for(blocks.count, 1, num_threads, [=](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        S* sum = sums.start(block);
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
          for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
            Vec<S> u = load<S>(x + row * cols + i, lanes);
            if (bias != nullptr) u += load<S>(bias + i, lanes);
            const Vec<S> du = load<S>(dy + row * cols + i, lanes) * gelu<S>(u, tanh).slope;
            store<S>(dx + row * cols + i, du, lanes);
            store<S>(sum + i, load<S>(sum + i, lanes) + du, lanes);
          });
        }
      }
    });
    if (dbias != nullptr) sums.finish(0, dbias, num_threads);
  });
}

}  // namespace fastbert::FASTBERT_ISA
