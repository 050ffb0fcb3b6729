// LayerNorm of one row, forward and backward (Ba et al. 2016), for the kernels that fuse it with
// what feeds it.
//
//   y = x̂ w + b,  x̂ = (z − mean) rstd,  rstd = 1 / √(var + ε), var with two passes
//   g = dy w,  dz = rstd (g − ⟨g⟩ − x̂ ⟨g x̂⟩),  dw = Σ_rows dy x̂,  db = Σ_rows dy     ⟨·⟩ over columns
#pragma once

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

template <class S>
struct RowStatistics {
  S mean;
  S rstd;
};

/// Of a row z, given the sum of its elements.
template <class S>
FASTBERT_INLINE RowStatistics<S> row_statistics(const S* z, int64_t cols, S sum, S eps) {
  const S mean = sum / static_cast<S>(cols);
  const auto squares =
      accumulate<S, 1>(cols, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
        const Vec<S> centred = keep<S>(load<S>(z + i, lanes) - mean, Vec<S>{}, lanes);
        acc[0] += centred * centred;
      });
  const S variance = squares.total[0] / static_cast<S>(cols);
  return {mean, static_cast<S>(1 / __builtin_sqrt(variance + eps))};
}

/// The backward of one row: adds to dweight and dbias, and hands dz to emit(i, lanes, dz).
template <class S, class G, class Z, class V, class Emit>
FASTBERT_INLINE void layer_norm_bwd_row(const G* dy, const Z* z, const V* weight,
                                        RowStatistics<S> row, int64_t cols, S* dweight, S* dbias,
                                        Emit emit) {
  const auto sums =
      accumulate<S, 2>(cols, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
        const Vec<S> upstream = load<S>(dy + i, lanes);
        const Vec<S> x_hat = (load<S>(z + i, lanes) - row.mean) * row.rstd;
        const Vec<S> g = upstream * load<S>(weight + i, lanes);
        store<S>(dweight + i, load<S>(dweight + i, lanes) + upstream * x_hat, lanes);
        store<S>(dbias + i, load<S>(dbias + i, lanes) + upstream, lanes);
        acc[0] += g;
        acc[1] += g * x_hat;
      });
  const S mean_g = sums.total[0] / static_cast<S>(cols);
  const S mean_g_x_hat = sums.total[1] / static_cast<S>(cols);
  for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
    const Vec<S> x_hat = (load<S>(z + i, lanes) - row.mean) * row.rstd;
    const Vec<S> g = load<S>(dy + i, lanes) * load<S>(weight + i, lanes);
    emit(i, lanes, row.rstd * (g - mean_g - x_hat * mean_g_x_hat));
  });
}

}  // namespace fastbert::FASTBERT_ISA
