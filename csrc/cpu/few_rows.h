// y = x wᵀ of few rows of x: a query or two, for which the weights are read once.
//
// A BLAS packs both factors for a product of any size; here that copies a matrix of weights, which is
// then used for a handful of rows. In place, an element of y is a sum along two rows that memory holds
// one after the other: kRows × kColumns of them are added up at once, each in a vector of its own, and
// the lanes of that at the end. A group of weights stays in L1 while all rows of x meet it, and the
// next one comes meanwhile.
#pragma once

#include <algorithm>

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

/// 4 × 6 sums, six vectors of w and one of x fill 31 of AVX-512's registers; 4 × 3, 3 and 1 all 16
/// elsewhere.
constexpr int kFewRows = 4;
constexpr int kFewColumns = FASTBERT_VECTOR_BYTES == 64 ? 6 : 3;

/// Lines of memory that a tile asks for on its way, one a step.
struct NextLines {
  const char* begin;
  int64_t bytes;
};

template <class T, int kRows, int kColumns>
void few_rows_tile(const float* x, const T* w, int64_t k, NextLines next, T* y, int64_t ldy) {
  constexpr int64_t L = kLanes<float>, kLine = 64;
  Vec<float> sum[kRows][kColumns] = {};
  const auto add = [&](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
    Vec<float> column[kColumns];
#pragma GCC unroll 6
    for (int c = 0; c < kColumns; ++c) column[c] = load<float>(w + c * k + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<float> row = load<float>(x + r * k + i, lanes);
#pragma GCC unroll 6
      for (int c = 0; c < kColumns; ++c) sum[r][c] += row * column[c];
    }
  };
  int64_t i = 0, asked = 0;
  for (; i + L <= k; i += L) {
    add(i, Whole{});
    if (asked < next.bytes) {
      __builtin_prefetch(next.begin + asked);
      asked += kLine;
    }
  }
  if (i < k) add(i, Part{k - i});
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < kColumns; ++c) {
      y[r * ldy + c] = narrow<T>(horizontal_sum<float>(sum[r][c]));
    }
  }
}

/// `rows` rows of x against kColumns rows of w.
template <class T, int kColumns>
void few_rows_group(const float* x, const T* w, int64_t rows, int64_t k, NextLines next, T* y,
                    int64_t ldy) {
  using Tile = void (*)(const float*, const T*, int64_t, NextLines, T*, int64_t);
  constexpr Tile kTiles[] = {&few_rows_tile<T, 1, kColumns>, &few_rows_tile<T, 2, kColumns>,
                             &few_rows_tile<T, 3, kColumns>, &few_rows_tile<T, 4, kColumns>};
  static_assert(sizeof kTiles / sizeof kTiles[0] == kFewRows);
  const int64_t tiles = (rows + kFewRows - 1) / kFewRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
    const int64_t begin = next.bytes * tile / tiles, end = next.bytes * (tile + 1) / tiles;
    kTiles[count - 1](x + first * k, w, k, {next.begin + begin, end - begin}, y + first * ldy, ldy);
  }
}

template <class T>
void few_rows(const T* x, const T* w, int64_t rows, int64_t k, int64_t columns, T* y, int64_t ldy,
              int num_threads) {
  if (rows == 0) return;
  const float* wide;
  if constexpr (sizeof(T) == sizeof(float)) {
    wide = x;
  } else {  // once, and not for each group of columns
    float* to = thread_scratch<float>(Scratch::kRows, rows * k);
    for_vectors<float>(rows * k, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
      store<float>(to + i, load<float>(x + i, lanes), lanes);
    });
    wide = to;
  }
  constexpr int64_t kGrain = 16;  // groups: some tens of microseconds
  const int64_t groups = (columns + kFewColumns - 1) / kFewColumns;
  parallel_for(groups, kGrain, num_threads, [=](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kFewColumns, columns);
    for (int64_t column = begin * kFewColumns; column < last; column += kFewColumns) {
      const T* group = w + column * k;
      if (column + kFewColumns <= last) {
        const int64_t following = std::min<int64_t>(kFewColumns, last - column - kFewColumns);
        const NextLines next = {reinterpret_cast<const char*>(group + kFewColumns * k),
                                following * k * static_cast<int64_t>(sizeof(T))};
        few_rows_group<T, kFewColumns>(wide, group, rows, k, next, y + column, ldy);
        continue;
      }
      for (int64_t c = column; c < last; ++c) {
        few_rows_group<T, 1>(wide, w + c * k, rows, k, {nullptr, 0}, y + c, ldy);
      }
    }
  });
}

inline void few_rows_product(const void* x, const void* w, int64_t rows, int64_t k, int64_t columns,
                             void* y, int64_t ldy, DType dtype, int num_threads) {
  if (dtype == DType::kBFloat16) {
    few_rows(static_cast<const bf16*>(x), static_cast<const bf16*>(w), rows, k, columns,
             static_cast<bf16*>(y), ldy, num_threads);
  } else {
    few_rows(static_cast<const float*>(x), static_cast<const float*>(w), rows, k, columns,
             static_cast<float*>(y), ldy, num_threads);
  }
}

}  // namespace fastbert::FASTBERT_ISA
