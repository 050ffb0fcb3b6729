// Rows out of a matrix by index, and back into a zero one.
#pragma once

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

inline void gather_rows(const void* x_ptr, const int64_t* index, int64_t count,
                        int64_t /*num_rows*/, int64_t cols, void* out_ptr, DType dtype,
                        int num_threads) {
  with_dtype(dtype, [=](auto t) {
    using T = typename decltype(t)::type;
    parallel_for(count, row_grain(cols), num_threads, [=](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        __builtin_memcpy(row_of<T>(out_ptr, k, cols), row_of<const T>(x_ptr, index[k], cols),
                         cols * sizeof(T));
      }
    });
  });
}

/// The first k with index[k] >= row, in an ascending index.
FASTBERT_INLINE int64_t lower_bound(const int64_t* index, int64_t count, int64_t row) {
  int64_t begin = 0;
  while (begin < count) {
    const int64_t middle = (begin + count) / 2;
    if (index[middle] < row) {
      begin = middle + 1;
    } else {
      count = middle;
    }
  }
  return begin;
}

inline void scatter_rows(const void* x_ptr, const int64_t* index, int64_t count, int64_t num_rows,
                         int64_t cols, void* out_ptr, DType dtype, int num_threads) {
  with_dtype(dtype, [=](auto t) {
    using T = typename decltype(t)::type;
    parallel_for(num_rows, row_grain(cols), num_threads, [=](int64_t begin, int64_t end) {
      int64_t k = lower_bound(index, count, begin);
      for (int64_t row = begin; row < end; ++row) {
        T* out = row_of<T>(out_ptr, row, cols);
        if (k < count && index[k] == row) {
          __builtin_memcpy(out, row_of<const T>(x_ptr, k, cols), cols * sizeof(T));
          ++k;
        } else {
          __builtin_memset(out, 0, cols * sizeof(T));
        }
      }
    });
  });
}

}  // namespace fastbert::FASTBERT_ISA
