// Rows of the inference engine between two Linears: embeddings and LayerNorm, fp32.
#pragma once

#include "layer_norm.h"

namespace fastbert::FASTBERT_ISA {

/// y (+)= row.
template <class T>
FASTBERT_INLINE void add_row(const void* data, bool first, int64_t cols, float* y) {
  const T* row = static_cast<const T*>(data);
  for_vectors<float>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
    const Vec<float> value = load<float>(row + i, lanes);
    store<float>(y + i, first ? value : load<float>(y + i, lanes) + value, lanes);
  });
}

/// See KernelTable (ops.h).
inline void sum_rows(const StoredRow* rows, int64_t count, int64_t cols, float* y) {
  for (int64_t k = 0; k < count; ++k) {
    if (rows[k].dtype == DType::kBFloat16) {
      add_row<bf16>(rows[k].data, k == 0, cols, y);
    } else {
      add_row<float>(rows[k].data, k == 0, cols, y);
    }
  }
}

/// See KernelTable (ops.h). The statistics are those of the op of the same name: two passes.
inline void layer_norm_rows(const float* z, const float* weight, const float* bias, int64_t rows,
                            int64_t cols, float eps, float* y) {
  for (int64_t row = 0; row < rows; ++row, z += cols, y += cols) {
    const auto sums =
        accumulate<float, 1>(cols, [=](int64_t i, auto lanes, auto* acc) FASTBERT_INLINE_LAMBDA {
          acc[0] += load<float>(z + i, lanes);
        });
    const auto statistics = row_statistics<float>(z, cols, sums.total[0], eps);
    for_vectors<float>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      const Vec<float> x_hat = (load<float>(z + i, lanes) - statistics.mean) * statistics.rstd;
      store<float>(y + i, x_hat * load<float>(weight + i, lanes) + load<float>(bias + i, lanes),
                   lanes);
    });
  }
}

}  // namespace fastbert::FASTBERT_ISA
