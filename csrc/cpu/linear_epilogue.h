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

template <Activation kActivation>
FASTBERT_INLINE Vec<float> activate(Vec<float> u) {
  if constexpr (kActivation == Activation::kGelu) return gelu_erf<float>(u).value;
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
