// What becomes of a tile of sums: dequantisation, bias, activation, residual, in fp32 vectors.
#pragma once

#include <type_traits>

#include "bias_gelu.h"
#include "linear.h"

namespace fastbert::FASTBERT_ISA {

/// tanh u = sign(u) (1 − e) / (1 + e), e = exp(−2 |u|). Near 0, where 1 − e cancels, u + u³ P(u²)
/// with P minimax for |u| ≤ 0.625.
FASTBERT_INLINE Vec<float> tanh(Vec<float> u) {
  const Vec<float> a = abs<float>(u);
  const Vec<float> e = exp(-2.0f * a);
  const Vec<float> far = (1.0f - e) / (1.0f + e);
  const Vec<float> squared = u * u;
  Vec<float> p = splat<float>(-0.0057049864f);
  p = p * squared + 0.0206390861f;
  p = p * squared - 0.0537397154f;
  p = p * squared + 0.133314416f;
  p = p * squared - 0.333332807f;
  const Vec<float> near = u + u * squared * p;
  return a < 0.625f ? near : u < 0 ? -far : far;
}

/// gelu(u) = max(u, 0) − g(|u|), g(a) = a Φ(−a) = a (c − a) P(2a/c − 1) for a < c = 5.75, 0 beyond:
/// within 1.3e-7, or 3e-7 of a large value. P, of degree 15, is minimax for what the tests allow.
/// (bias_gelu.h also keeps the digits of Φ far below 0, which a gradient needs; with its exponential
/// and division it takes 1.6 times as long.) The terms of P are added four by four: Horner's rule
/// has fewer operations, but in one chain, of which too few fit into the processor's window; it takes
/// 1.3 times as long.
FASTBERT_INLINE Vec<float> gelu_within(Vec<float> u) {
  constexpr float kEnd = 5.75f;
  constexpr float kP[16] = {0.000702656922f, -0.00569552789f, 0.0207467228f,  -0.0432889685f,
                            0.0526124127f,   -0.0266031772f,  -0.0231835004f, 0.0512927994f,
                            -0.0287925825f,  -0.0173487738f,  0.0329872072f,  -0.00759434607f,
                            -0.0139773479f,  0.00759880478f,  0.00238284795f, -0.00183905754f};
  const Vec<float> a = min<float>(splat<float>(kEnd), abs<float>(u));
  const Vec<float> x = a * (2.0f / kEnd) - 1.0f;
  const Vec<float> x2 = x * x, x4 = x2 * x2;
  const auto four = [&](int i) FASTBERT_INLINE_LAMBDA {
    return (kP[i + 3] * x + kP[i + 2]) * x2 + (kP[i + 1] * x + kP[i]);
  };
  const Vec<float> p = ((four(12) * x4 + four(8)) * x4 + four(4)) * x4 + four(0);
  return max<float>(Vec<float>{}, u) - a * (kEnd - a) * p;
}

template <Activation kActivation>
FASTBERT_INLINE Vec<float> activate(Vec<float> u) {
  if constexpr (kActivation == Activation::kGelu) return gelu_within(u);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh<float>(u).value;
  if constexpr (kActivation == Activation::kRelu) return max<float>(Vec<float>{}, u);
  if constexpr (kActivation == Activation::kSilu) return u / (1.0f + exp(-u));
  if constexpr (kActivation == Activation::kTanh) return tanh(u);
  return u;
}

/// What the columns and rows of a tile are scaled by, and what is added (linear.h).
struct TileScale {
  const float* x_scale;  // these four: int8 weights only
  const float* x_offset;
  const float* w_scale;
  const float* column_sum;
  const float* bias;
};

/// rows × kStride sums, a multiple of the vectors -> rows × columns of y, whose rows, like those of residual (nullptr:
/// none), are `stride` apart.
template <class Sum>
using TileFinish = void (*)(const Sum* sums, int64_t rows, int64_t columns, TileScale scale,
                            const float* residual, float* y, int64_t stride);

template <class Sum, int64_t kStride, Activation kActivation>
void finish_tile(const Sum* sums, int64_t rows, int64_t columns, TileScale scale,
                 const float* residual, float* y, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors<float>(columns, [=](int64_t j, auto lanes) FASTBERT_INLINE_LAMBDA {
      // Sums, scales and biases reach to the end of the panel.
      Vec<float> u;
      if constexpr (std::is_same_v<Sum, int32_t>) {
        const auto sum = load_raw<IntVec<float>>(sums + j);
        const Vec<float> factor = scale.x_scale[row] * load<float>(scale.w_scale + j);
        const Vec<float> base =
            scale.x_offset[row] * load<float>(scale.column_sum + j) + load<float>(scale.bias + j);
        u = __builtin_convertvector(sum, Vec<float>) * factor + base;
      } else {
        u = load<float>(sums + j) + load<float>(scale.bias + j);
      }
      Vec<float> value = activate<kActivation>(u);
      if (residual != nullptr) value += load<float>(residual + j, lanes);
      store<float>(y + j, value, lanes);
    });
    sums += kStride;
    y += stride;
    if (residual != nullptr) residual += stride;
  }
}

template <class Sum, int64_t kStride>
FASTBERT_INLINE TileFinish<Sum> tile_finish(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return finish_tile<Sum, kStride, Activation::kNone>;
    case Activation::kGelu:
      return finish_tile<Sum, kStride, Activation::kGelu>;
    case Activation::kGeluTanh:
      return finish_tile<Sum, kStride, Activation::kGeluTanh>;
    case Activation::kRelu:
      return finish_tile<Sum, kStride, Activation::kRelu>;
    case Activation::kSilu:
      return finish_tile<Sum, kStride, Activation::kSilu>;
    case Activation::kTanh:
      return finish_tile<Sum, kStride, Activation::kTanh>;
  }
  return nullptr;
}

}  // namespace fastbert::FASTBERT_ISA
