// Register-tiled matrix products on small, cache-resident matrices, and the packing that feeds them.
//
//   C[m × n] (+)= A[m × k] · B[k × n]
//
// A kernel keeps a tile of C in registers and walks k once: a row of B comes in as vectors, each
// element of A as a broadcast. A needs no packing, transposed or not, since a broadcast does not care
// about strides. B is read in panels of up to kPanelVectors vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace fastbert::FASTBERT_ISA {

/// The widest panel: 6 × 4 accumulators, 4 vectors of B and one of A fill 29 of AVX-512's 32
/// registers; 6 × 2, 2 and 1 fill 15 of the 16 elsewhere.
constexpr int kPanelVectors = FASTBERT_VECTOR_BYTES == 64 ? 4 : 2;
template <class S>
constexpr int64_t kPanel = kPanelVectors * kLanes<S>;

/// Rows of C a kernel keeps. Two FMAs a cycle of latency four want eight accumulators or more.
constexpr int tile_rows(int vectors) { return vectors == kPanelVectors ? 6 : 8; }

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/// The right-hand matrix B: element (k, j) is
/// data[j / kPanel · panel_stride + k · row_stride + j % kPanel].
template <class S>
struct Panels {
  const S* data;
  int64_t row_stride;
  int64_t panel_stride;
};

/// A matrix stored row by row, `columns` apart.
template <class S>
FASTBERT_INLINE Panels<S> row_major(const S* data, int64_t columns) {
  return {data, columns, kPanel<S>};
}

/// A matrix of `rows` rows as pack_transposed() leaves it: panel after panel, so that a panel is one
/// contiguous piece. (Rows of a wide matrix a power of two apart would evict each other from L1.)
template <class S>
FASTBERT_INLINE Panels<S> panel_major(const S* data, int64_t rows) {
  return {data, kPanel<S>, rows * kPanel<S>};
}

template <class S>
using TileKernel = void (*)(int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb, S* c,
                            int64_t ldc, bool accumulate);

/// One tile, kRows × kVectors vectors. Element (i, k) of A is a[i · lda + k], or a[k · lda + i].
template <class S, bool kTransposedA, int kVectors, int kRows>
void multiply_tile(int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb, S* c, int64_t ldc,
                   bool accumulate) {
  constexpr int64_t L = kLanes<S>;
  Vec<S> acc[kRows][kVectors] = {};
  for (int64_t step = 0; step < k; ++step) {
    Vec<S> row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load<S>(b + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const S factor = kTransposedA ? a[i] : a[i * lda];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += factor * row[j];
    }
    a += kTransposedA ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      S* to = c + i * ldc + j * L;
      store<S>(to, accumulate ? load<S>(to) + acc[i][j] : acc[i][j]);
    }
  }
}

/// The kernel of one panel width for `rows` rows, 1 … tile_rows(kVectors).
template <class S, bool kTransposedA, int kVectors, int kRows = tile_rows(kVectors)>
FASTBERT_INLINE TileKernel<S> tile_kernel(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_kernel<S, kTransposedA, kVectors, kRows - 1>(rows);
  }
  return multiply_tile<S, kTransposedA, kVectors, kRows>;
}

/// One panel: the rows of C in tiles as even as they come, since a tile of one or two rows would
/// wait for its own additions.
template <class S, bool kTransposedA, int kVectors>
FASTBERT_INLINE void multiply_panel(int64_t m, int64_t k, const S* a, int64_t lda, const S* b,
                                    int64_t ldb, S* c, int64_t ldc, bool accumulate) {
  const int64_t tiles = (m + tile_rows(kVectors) - 1) / tile_rows(kVectors);
  const int64_t rows = m / tiles;
  const int64_t taller = m % tiles;  // so many tiles have one row more
  auto kernel = tile_kernel<S, kTransposedA, kVectors>(rows + (taller > 0));
  for (int64_t tile = 0, i = 0; tile < tiles; ++tile) {
    if (tile == taller) kernel = tile_kernel<S, kTransposedA, kVectors>(rows);
    kernel(k, a + i * (kTransposedA ? 1 : lda), lda, b, ldb, c + i * ldc, ldc, accumulate);
    i += rows + (tile < taller);
  }
}

/// C (+)= A · B, or Aᵀ · B where A is stored k × m. n is a multiple of kLanes<S>. Every element of C
/// is a sum over kDepth rows of B at a time in ascending order: its bits depend on nothing else. (The
/// short sums are what makes a product over 1000 rows as accurate as a library's: one chain of
/// additions from the first row to the last had twice the error.)
template <class S, bool kTransposedA = false>
void multiply(int64_t m, int64_t n, int64_t k, const S* a, int64_t lda, Panels<S> b, S* c,
              int64_t ldc, bool accumulate) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t kDepth = 128;  // rows of a panel that stay in L1 beside the tiles of A
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    for (int64_t j = 0; j < n;) {
      const S* panel = b.data + j / kPanel<S> * b.panel_stride + j % kPanel<S> + k0 * b.row_stride;
      const auto run = [&](auto vectors) FASTBERT_INLINE_LAMBDA {
        multiply_panel<S, kTransposedA, decltype(vectors)::value>(
            m, depth, a, lda, panel, b.row_stride, c + j, ldc, accumulate || k0 > 0);
        j += vectors * L;
      };
      if (const int64_t left = (n - j) / L; left >= kPanelVectors) {
        run(std::integral_constant<int, kPanelVectors>{});
      } else if (left >= 2) {
        run(std::integral_constant<int, 2>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    }
    a += depth * (kTransposedA ? lda : 1);
  }
}

/// to[i][0 … columns) = factor · from[i][…], widened; rows of `to` are round_up(columns) long and
/// filled up with zeros.
template <class S, class T>
FASTBERT_INLINE void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                               S factor, S* to) {
  const int64_t to_stride = round_up(columns, kLanes<S>);
  for (int64_t i = 0; i < rows; ++i) {
    for_vectors<S>(columns, [&](int64_t j, auto lanes) FASTBERT_INLINE_LAMBDA {
      store<S>(to + i * to_stride + j, factor * load<S>(from + i * from_stride + j, lanes));
    });
  }
}

/// The way back: to[i][0 … columns) = factor · from[i][…], rounded to T.
template <class S, class T>
FASTBERT_INLINE void write_rows(const S* from, int64_t rows, int64_t columns, S factor, T* to,
                                int64_t to_stride) {
  const int64_t from_stride = round_up(columns, kLanes<S>);
  for (int64_t i = 0; i < rows; ++i) {
    for_vectors<S>(columns, [&](int64_t j, auto lanes) FASTBERT_INLINE_LAMBDA {
      store<S>(to + i * to_stride + j, factor * load<S>(from + i * from_stride + j), lanes);
    });
  }
}

/// Transposes kLanes × kLanes elements. One round turns row bit (top) into column bit (bottom) and
/// moves the top column bit into the row; log2(kLanes) rounds exchange them all.
template <class S>
FASTBERT_INLINE void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int64_t L = kLanes<S>;
  const IntVec<S> low = lane_index<S>() / 2 + lane_index<S>() % 2 * L;
  for (int64_t round = 1; round < L; round *= 2) {
    Vec<S> next[L];
#pragma GCC unroll 8
    for (int64_t i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], low + L / 2);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) rows[i] = next[i];
  }
}

/// fromᵀ as panel_major(to, columns), or in panels of P: `rows` rows of `columns` elements become the
/// columns of B. The last vector of columns is filled up with zeros.
template <class S, int64_t P = kPanel<S>, class T>
void pack_transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns, S* to) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t i = 0; i < rows; i += L) {
    S* panel = to + i / P * P * columns + i % P;
    const int64_t real = std::min(L, rows - i);
    for_vectors<S>(columns, [&](int64_t j, auto lanes) FASTBERT_INLINE_LAMBDA {
      Vec<S> block[L];
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) {
        block[r] = r < real ? load<S>(from + (i + r) * from_stride + j, lanes) : Vec<S>{};
      }
      transpose<S>(block);
      const int64_t count = std::min(L, columns - j);
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) {
        if (r < count) store<S>(panel + (j + r) * P, block[r]);
      }
    });
  }
}

}  // namespace fastbert::FASTBERT_ISA
