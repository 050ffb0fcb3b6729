// y = LayerNorm(z), z = residual + dropout(x + x_bias), and its gradients. One read of every input,
// one write of every output: a row stays in the first-level cache between its passes.
#pragma once

#include "layer_norm.h"
#include "philox.h"

namespace fastbert::FASTBERT_ISA {

inline void add_layer_norm_fwd(const void* x_ptr, const void* residual_ptr, const void* x_bias_ptr,
                               const void* weight_ptr, const void* bias_ptr, int64_t rows,
                               int64_t cols, double eps, double dropout_p, uint64_t seed,
                               uint32_t offset, void* y_ptr, void* z_ptr, void* mean_ptr,
                               void* rstd_ptr, DType dtype, DType vector_dtype, int num_threads) {
  const Dropout dropout = make_dropout(dropout_p, seed, offset);
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const V* x_bias = static_cast<const V*>(x_bias_ptr);
    const V* weight = static_cast<const V*>(weight_ptr);
    const V* bias = static_cast<const V*>(bias_ptr);
    S* means = static_cast<S*>(mean_ptr);
    S* rstds = static_cast<S*>(rstd_ptr);

    parallel_for(rows, row_grain(cols), num_threads, [=](int64_t begin, int64_t end) {
      S* z_row = thread_scratch<S>(Scratch::kRow, cols);
      float* mask = dropout_scratch(dropout, cols);
      const S kept_scale = static_cast<S>(dropout.scale);
      for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<const T>(x_ptr, row, cols);
        const T* residual = row_of<const T>(residual_ptr, row, cols);
        T* z = row_of<T>(z_ptr, row, cols);
        T* y = row_of<T>(y_ptr, row, cols);
        if (dropout.active) dropout_row(dropout, static_cast<uint32_t>(row), 0, 0, cols, mask);

        const auto sums =
            accumulate<S, 1>(cols, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
              Vec<S> value = load<S>(x + i, lanes);
              if (x_bias != nullptr) value += load<S>(x_bias + i, lanes);
              if (dropout.active) value *= kept_scale * load<S>(mask + i, lanes);
              if (residual != nullptr) value += load<S>(residual + i, lanes);
              value = round_to<T, S>(value);
              if (z != nullptr) store<S>(z + i, value, lanes);
              store<S>(z_row + i, value, lanes);
              acc[0] += value;
            });
        const auto statistics = row_statistics<S>(z_row, cols, sums.total[0], static_cast<S>(eps));
        for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
          const Vec<S> x_hat = (load<S>(z_row + i, lanes) - statistics.mean) * statistics.rstd;
          store<S>(y + i, x_hat * load<S>(weight + i, lanes) + load<S>(bias + i, lanes), lanes);
        });
        if (means != nullptr) means[row] = statistics.mean;
        if (rstds != nullptr) rstds[row] = statistics.rstd;
      }
    });
  });
}

inline void add_layer_norm_bwd(const void* dy_ptr, const void* z_ptr, const void* weight_ptr,
                               const void* mean_ptr, const void* rstd_ptr, int64_t rows,
                               int64_t cols, double dropout_p, uint64_t seed, uint32_t offset,
                               void* dz_ptr, void* dx_ptr, void* dweight_ptr, void* dbias_ptr,
                               void* dx_bias_ptr, DType dtype, DType vector_dtype,
                               int num_threads) {
  const Dropout dropout = make_dropout(dropout_p, seed, offset);
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const V* weight = static_cast<const V*>(weight_ptr);
    const S* mean = static_cast<const S*>(mean_ptr);
    const S* rstd = static_cast<const S*>(rstd_ptr);

    const RowBlocks blocks(rows);
    const ColumnSums<S, 3> sums(blocks, cols);
    parallel_for(blocks.count, 1, num_threads, [=](int64_t first, int64_t last) {
      float* mask = dropout_scratch(dropout, cols);
      const S kept_scale = static_cast<S>(dropout.scale);
      for (int64_t block = first; block < last; ++block) {
        S* dweight = sums.start(block);
        S* dbias = dweight + cols;
        S* dx_bias = dbias + cols;
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
          T* dz = row_of<T>(dz_ptr, row, cols);
          T* dx = row_of<T>(dx_ptr, row, cols);
          if (dropout.active) dropout_row(dropout, static_cast<uint32_t>(row), 0, 0, cols, mask);
          layer_norm_bwd_row<S>(
              row_of<const T>(dy_ptr, row, cols), row_of<const T>(z_ptr, row, cols), weight,
              RowStatistics<S>{mean[row], rstd[row]}, cols, dweight, dbias,
              [=](int64_t i, auto lanes, Vec<S> grad) FASTBERT_INLINE_LAMBDA {
                store<S>(dz + i, grad, lanes);
                if (dropout.active) grad *= kept_scale * load<S>(mask + i, lanes);
                if (dx != nullptr) store<S>(dx + i, grad, lanes);
                if (dx_bias_ptr != nullptr) {
                  store<S>(dx_bias + i, load<S>(dx_bias + i, lanes) + grad, lanes);
                }
              });
        }
      }
    });
    sums.finish(0, static_cast<V*>(dweight_ptr), num_threads);
    sums.finish(1, static_cast<V*>(dbias_ptr), num_threads);
    if (dx_bias_ptr != nullptr) sums.finish(2, static_cast<V*>(dx_bias_ptr), num_threads);
  });
}

}  // namespace fastbert::FASTBERT_ISA
