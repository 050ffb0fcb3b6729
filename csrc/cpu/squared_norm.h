// Σ x² over a list of tensors, what gradients are clipped by.
#pragma once

#include "tensor_blocks.h"

namespace fastbert::FASTBERT_ISA {

/// Runs of kRun squares are summed in fp32 (fp64 for fp64), and these sums in fp64: an error of some
/// 1e-7 whatever the size, where fp32 throughout, as torch has it, loses 4e-6 of MiniLM-L6's norm.
template <class T>
FASTBERT_INLINE double sum_of_squares(const T* x, int64_t count) {
  using S = Compute<T>;
  constexpr int64_t kRun = 1024;
  double total = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t length = count - start < kRun ? count - start : kRun;
    const auto run =
        accumulate<S, 1>(length, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
          const Vec<S> value = load<S>(x + start + i, lanes);
          acc[0] += value * value;
        });
    total += run.total[0];
  }
  return total;
}

inline void squared_norm(const ListedTensor* tensors, int64_t count, double* sum, int num_threads) {
  const TensorBlocks blocks(count, [=](int64_t k) { return tensors[k].numel; });
  double* partials = thread_scratch<double>(Scratch::kPartials, blocks.count());
  parallel_for(blocks.count(), 1, num_threads, [=, &blocks](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const auto [tensor, start] = blocks.find(block);
      const ListedTensor& x = tensors[tensor];
      const int64_t left = x.numel - start;
      const int64_t length = left < TensorBlocks::kSize ? left : TensorBlocks::kSize;
      with_dtype(static_cast<DType>(x.dtype), [=, &x, start = start](auto t) {
        using T = typename decltype(t)::type;
        partials[block] = sum_of_squares(static_cast<const T*>(x.data) + start, length);
      });
    }
  });
  *sum = 0;
  for (int64_t block = 0; block < blocks.count(); ++block) *sum += partials[block];
}

}  // namespace fastbert::FASTBERT_ISA
