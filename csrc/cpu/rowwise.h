// What the row-wise kernels share: dtype dispatch, and the partitions of rows among threads.
#pragma once

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace fastbert::FASTBERT_ISA {

template <class T>
struct Tag {
  using type = T;
};

/// body(Tag<T>{}) for the activation type.
template <class Body>
void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Tag<float>{});
    case DType::kBFloat16:
      return body(Tag<bf16>{});
    case DType::kFloat64:
      return body(Tag<double>{});
  }
}

/// body(Tag<T>{}, Tag<V>{}) for the types of activations and vectors; V is T or float.
template <class Body>
void with_dtypes(DType dtype, DType vector_dtype, Body body) {
  with_dtype(dtype, [&](auto t) {
    if (vector_dtype == DType::kFloat32) {
      body(t, Tag<float>{});
    } else {
      body(t, t);
    }
  });
}

/// The address of a row; an array that is not given has no rows.
template <class T, class P>
FASTBERT_INLINE T* row_of(P* array, int64_t row, int64_t cols) {
  return array == nullptr ? nullptr : static_cast<T*>(array) + row * cols;
}

/// Rows a thread takes at once: enough work (some microseconds) to be worth the hand-out.
FASTBERT_INLINE int64_t row_grain(int64_t cols) {
  constexpr int64_t kElements = 8192;
  return cols < kElements ? kElements / cols : 1;
}

/// The partition of rows behind sums over rows. It depends on their number alone, so that the sums
/// do not depend on the threads.
struct RowBlocks {
  explicit RowBlocks(int64_t rows)
      : rows(rows),
        size((rows + kMaxBlocks - 1) / kMaxBlocks < kMinSize
                 ? kMinSize
                 : (rows + kMaxBlocks - 1) / kMaxBlocks),
        count((rows + size - 1) / size) {}

  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return (block + 1) * size < rows ? (block + 1) * size : rows; }

  static constexpr int64_t kMaxBlocks = 64;
  static constexpr int64_t kMinSize = 16;
  const int64_t rows;
  const int64_t size;
  const int64_t count;
};

/// Sums over rows of K arrays of `cols` columns: each row block adds to its own partial sums, and
/// finish() adds those up in block order.
template <class S, int K>
class ColumnSums {
 public:
  ColumnSums(const RowBlocks& blocks, int64_t cols)
      : blocks_(blocks),
        cols_(cols),
        partials_(thread_scratch<S>(Scratch::kPartials, blocks.count * K * cols)) {}

  /// The zeroed partial sums of a block, K arrays of `cols` one after the other.
  S* start(int64_t block) const {
    S* partial = partials_ + block * K * cols_;
    __builtin_memset(partial, 0, K * cols_ * sizeof(S));
    return partial;
  }

  /// The k-th sum, rounded to V.
  template <class V>
  void finish(int k, V* out, int num_threads) const {
    const int64_t blocks = blocks_.count, cols = cols_;
    const S* partials = partials_ + k * cols;
    parallel_for(cols, 1024, num_threads, [=](int64_t begin, int64_t end) {
      for_vectors<S>(end - begin, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
        Vec<S> sum = {};
        for (int64_t b = 0; b < blocks; ++b) {
          sum += load<S>(partials + b * K * cols + begin + i, lanes);
        }
        store<S>(out + begin + i, sum, lanes);
      });
    });
  }

 private:
  const RowBlocks blocks_;
  const int64_t cols_;
  S* const partials_;
};

}  // namespace fastbert::FASTBERT_ISA
