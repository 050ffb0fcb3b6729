// Cross-entropy of rows of logits, and their gradient in place.
//
//   u = logits + bias;  loss = log Σ exp u − u[label];  dlogits = (softmax(u) − onehot(label)) · scale
#pragma once

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

/// max u and Σ exp(u − max) of a row.
template <class S>
struct SoftmaxSums {
  S max;
  S total;
};

/// One read of the row: a block of columns that fits the first-level cache is searched for its
/// maximum, then summed, and what was summed before is rescaled when the maximum grew.
template <class S, class T, class V>
FASTBERT_INLINE SoftmaxSums<S> softmax_sums(const T* logits, const V* bias, int64_t vocab) {
  constexpr int64_t kBlock = 2048;
  constexpr S kLowest = static_cast<S>(-__builtin_inf());
  SoftmaxSums<S> sums{kLowest, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = vocab - start < kBlock ? vocab - start : kBlock;
    const auto u = [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      const Vec<S> value = load<S>(logits + start + i, lanes);
      return bias == nullptr ? value : value + load<S>(bias + start + i, lanes);
    };
    Vec<S> highest = splat<S>(sums.max);
    for_vectors<S>(count, [=, &highest](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      highest = max<S>(keep<S>(u(i, lanes), splat<S>(kLowest), lanes), highest);
    });
    const S block_max = horizontal_max<S>(highest);
    if (block_max > sums.max) {
      sums.total *= static_cast<S>(__builtin_exp(sums.max - block_max));
      sums.max = block_max;
    }
    const S shift = sums.max == kLowest ? 0 : sums.max;  // −inf − (−inf) would not be −inf
    const auto block =
        accumulate<S, 1>(count, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
          acc[0] += keep<S>(exp(u(i, lanes) - shift), Vec<S>{}, lanes);
        });
    sums.total += block.total[0];
  }
  return sums;
}

inline void cross_entropy_rows(void* logits_ptr, int64_t row_stride, const void* bias_ptr,
                               const int64_t* labels, int64_t rows, int64_t vocab,
                               int64_t ignore_index, bool write_grad, double grad_scale,
                               void* loss_ptr, DType dtype, DType vector_dtype, int num_threads) {
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const V* bias = static_cast<const V*>(bias_ptr);
    S* losses = static_cast<S*>(loss_ptr);

    parallel_for(rows, row_grain(vocab), num_threads, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* logits = row_of<T>(logits_ptr, row, row_stride);
        const int64_t label = labels[row];
        if (label == ignore_index) {
          losses[row] = 0;
          if (write_grad) __builtin_memset(logits, 0, vocab * sizeof(T));
          continue;
        }
        const auto sums = softmax_sums<S>(logits, bias, vocab);
        S u_label = widen(logits[label]);
        if (bias != nullptr) u_label += widen(bias[label]);
        const double loss = __builtin_log(sums.total) + (sums.max - u_label);
        losses[row] = static_cast<S>(loss);
        if (!write_grad) continue;

        const S scale = static_cast<S>(grad_scale / sums.total);
        for_vectors<S>(vocab, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
          Vec<S> u = load<S>(logits + i, lanes);
          if (bias != nullptr) u += load<S>(bias + i, lanes);
          store<S>(logits + i, exp(u - sums.max) * scale, lanes);
        });
        // softmax(u)[label] − 1 = e^(−loss) − 1, without cancellation.
        logits[label] = narrow<T>(static_cast<S>(__builtin_expm1(-loss) * grad_scale));
      }
    });
  });
}

}  // namespace fastbert::FASTBERT_ISA
