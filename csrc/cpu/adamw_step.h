// AdamW (Loshchilov, Hutter, arXiv 1711.05101, algorithm 2) over all parameters of a model in one pass:
//
//   g = grad / scale
//   m += (1 − β₁) (g − m),  v = β₂ v + (1 − β₂) g²
//   p = p (1 − lr decay) − lr (m / c₁) / (√(v / c₂) + ε),  c = 1 − β^step, or 1 without bias correction
//
// Bound by memory: 28 bytes an element (fp32 gradients), 46 GB/s on two cores of a Sapphire Rapids.
// Leaving out the stores of moments that stay what they are, as most words' do, gained nothing there.
#pragma once

#include "tensor_blocks.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastbert::FASTBERT_ISA {

/// While one lives, this thread reads and writes subnormal numbers (below 1.2e-38) as 0.
///
/// An x86 takes some 150 cycles more for each vector with one, and moments come to hold many: m of a
/// word that is seen no more shrinks by β₁ an update, is subnormal after 750 and, rounded to the
/// nearest, then stays what it is for ever. A step of 22.7 million parameters with such m took 149
/// ms (torch's 214) where it takes 14. Other processors lose no time.
class FlushSubnormals {
#if defined(__SSE__)
 public:
  FlushSubnormals() : former_(_mm_getcsr()) { _mm_setcsr(former_ | kFlushResults | kZeroInputs); }
  ~FlushSubnormals() { _mm_setcsr(former_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kZeroInputs = 0x0040;
  const unsigned former_;
#endif
};

/// The numbers of the equation for one slot, worked out in double.
struct AdamWFactors {
  float inverse_scale;  // 1 / scale
  float weight1;        // 1 − β₁: an fp32 β is not precise enough to be taken from 1
  float beta2;
  float weight2;       // 1 − β₂
  float kept;          // 1 − lr decay
  float rate;          // lr / c₁
  float inverse_root;  // 1 / √c₂
  float eps;
};

template <class G>
FASTBERT_INLINE void adamw_block(const AdamWSlot& slot, const AdamWFactors& factors, int64_t start,
                                 int64_t count) {
  const AdamWFactors f = factors;
  float* param = slot.param + start;
  const G* grad = static_cast<const G*>(slot.grad) + start;
  float* exp_avg = slot.exp_avg + start;
  float* exp_avg_sq = slot.exp_avg_sq + start;
  bf16* copy = slot.copy == nullptr ? nullptr : slot.copy + start;
  for_vectors<float>(count, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
    const Vec<float> g = load<float>(grad + i, lanes) * f.inverse_scale;
    const Vec<float> old_m = load<float>(exp_avg + i, lanes);
    const Vec<float> m = old_m + f.weight1 * (g - old_m);
    const Vec<float> v = f.beta2 * load<float>(exp_avg_sq + i, lanes) + f.weight2 * (g * g);
    const Vec<float> root = sqrt(v) * f.inverse_root + f.eps;
    const Vec<float> p = load<float>(param + i, lanes) * f.kept - f.rate * m / root;
    store<float>(exp_avg + i, m, lanes);
    store<float>(exp_avg_sq + i, v, lanes);
    store<float>(param + i, p, lanes);
    if (copy != nullptr) store<float>(copy + i, p, lanes);
  });
}

inline void adamw_step(const AdamWSlot* slots, int64_t count, double beta1, double beta2,
                       double eps, bool bias_correction, double grad_scale, int num_threads) {
  const auto factors_of = [=](const AdamWSlot& slot) {
    const double step = *slot.step;
    const double c1 = bias_correction ? 1 - __builtin_pow(beta1, step) : 1;
    const double c2 = bias_correction ? 1 - __builtin_pow(beta2, step) : 1;
    return AdamWFactors{static_cast<float>(1 / grad_scale),
                        static_cast<float>(1 - beta1),
                        static_cast<float>(beta2),
                        static_cast<float>(1 - beta2),
                        static_cast<float>(1 - slot.lr * slot.weight_decay),
                        static_cast<float>(slot.lr / c1),
                        static_cast<float>(1 / __builtin_sqrt(c2)),
                        static_cast<float>(eps)};
  };
  const TensorBlocks blocks(count, [=](int64_t k) { return slots[k].numel; });
  parallel_for(blocks.count(), 1, num_threads, [=, &blocks](int64_t first, int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (int64_t block = first; block < last; ++block) {
      const auto [tensor, start] = blocks.find(block);
      const AdamWSlot& slot = slots[tensor];
      const int64_t left = slot.numel - start;
      const int64_t length = left < TensorBlocks::kSize ? left : TensorBlocks::kSize;
      const AdamWFactors factors = factors_of(slot);
      if (static_cast<DType>(slot.grad_dtype) == DType::kBFloat16) {
        adamw_block<bf16>(slot, factors, start, length);
      } else {
        adamw_block<float>(slot, factors, start, length);
      }
    }
  });
}

}  // namespace fastbert::FASTBERT_ISA
