// The frame of a unit of Linear kernels: blocks of rows, pieces of 64 columns, tiles, the table.
//
// A unit brings a kernel for int8 and one for bf16. A kernel K is a struct of statics:
//
//   K::Weight, K::Sum       types of an element of weights and of a sum (int32 or float)
//   K::kTileRows            rows that tile() takes at most
//   K::kBlockRows           rows that are prepared at once, and then stay in L2
//   K::kPanelColumns        columns of a panel: what tile() takes. A piece is 64 / kPanelColumns of them
//   K::kStepBytes           bytes of a packed panel between two steps of `ahead`
//   K::panel_bytes(in)      size of a packed panel
//   K::pack_piece(w, in, columns, piece)             w (columns × in), columns at most 64 -> panels
//   K::Rows(in, x, rows)    rows of x in the form that tile() reads
//   K::tile(rows, first, count, panel, ahead, sums)  sums[i][j] = Σ_k x[first + i, k] · w[j, k]
//
// One panel meets all rows of a block before the next one comes: a narrow one stays in L1. Sums go
// through a tile of memory that stays there too: storing and loading it takes a few per cent of the
// time of the sums, and no kernel has to know what becomes of them.
#pragma once

#include <algorithm>

#include "linear.h"
#include "linear_epilogue.h"
#include "linear_pack.h"
#include "linear_quantize.h"

namespace fastbert::FASTBERT_ISA {

FASTBERT_INLINE LinearInput from_row(const LinearInput& x, int64_t row, int64_t in) {
  if (x.quantized == nullptr) return {nullptr, nullptr, nullptr, x.values + row * in};
  return {x.quantized + row * quantized_stride(in), x.scale + row, x.offset + row, nullptr};
}

template <class Kernel>
void run_kernel(const PackedLinear& w, const LinearInput& x, int64_t rows, int64_t first,
                int64_t last, Activation activation, const float* residual, float* y,
                int64_t stride, Upcoming upcoming) {
  using Sum = typename Kernel::Sum;
  constexpr int64_t P = Kernel::kPanelColumns;
  const auto finish = tile_finish<Sum, P>(activation);
  const int64_t panel_bytes = Kernel::panel_bytes(w.in);
  for (int64_t block = 0; block < rows; block += Kernel::kBlockRows) {
    const int64_t block_rows = std::min(Kernel::kBlockRows, rows - block);
    const LinearInput input = from_row(x, block, w.in);
    const typename Kernel::Rows prepared(w.in, input, block_rows);
    // Tiles as even as they come: a tile of one row would wait for its own additions.
    const int64_t tiles = (block_rows + Kernel::kTileRows - 1) / Kernel::kTileRows;
    for (int64_t column = first; column < last; column += P) {
      const char* panel = static_cast<const char*>(w.weights) + column / P * panel_bytes;
      // While this panel is computed, the one at the same place in the next piece comes into L2; after
      // the last piece, what the caller needs next.
      Upcoming ahead_of_panel = {panel + kColumnBlock / P * panel_bytes, panel_bytes};
      if (column + kColumnBlock >= last) {
        const int64_t share = upcoming.bytes / (kColumnBlock / P);
        ahead_of_panel = {upcoming.begin + column % kColumnBlock / P * share, share};
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = block_rows * tile / tiles;
        const int64_t count = block_rows * (tile + 1) / tiles - begin;
        alignas(64) Sum sums[Kernel::kTileRows][P];
        const int64_t slice = ahead_of_panel.bytes / tiles;
        Ahead ahead(slice == 0 ? panel : ahead_of_panel.begin + tile * slice, slice,
                    panel_bytes / Kernel::kStepBytes);
        Kernel::tile(prepared, begin, count, panel, ahead, sums);
        const int64_t at = (block + begin) * stride + column;
        TileScale scale{nullptr, nullptr, nullptr, nullptr, w.bias + column};
        if (w.kind == Weights::kInt8) {
          scale = {input.scale + begin, input.offset + begin, w.scale + column,
                   w.column_sum + column, w.bias + column};
        }
        finish(sums[0], count, std::min(P, last - column), scale,
               residual == nullptr ? nullptr : residual + at, y + at, stride);
      }
    }
  }
}

template <class Kernel>
int64_t piece_bytes(int64_t in) {
  return kColumnBlock / Kernel::kPanelColumns * Kernel::panel_bytes(in);
}

template <class Kernel>
void pack_kernel(const void* w, int64_t in, int64_t out, void* packed) {
  using Weight = typename Kernel::Weight;
  for (int64_t column = 0; column < out; column += kColumnBlock) {
    Kernel::pack_piece(
        static_cast<const Weight*>(w) + column * in, in, std::min(kColumnBlock, out - column),
        static_cast<char*>(packed) + column / kColumnBlock * piece_bytes<Kernel>(in));
  }
}

/// The table of a unit with these two kernels.
template <class Int8, class BFloat16>
struct LinearUnit {
  static size_t packed_bytes(Weights kind, int64_t in, int64_t out) {
    const int64_t pieces = (out + kColumnBlock - 1) / kColumnBlock;
    return pieces * (kind == Weights::kInt8 ? piece_bytes<Int8>(in) : piece_bytes<BFloat16>(in));
  }
  static void pack(Weights kind, const void* w, int64_t in, int64_t out, void* packed) {
    (kind == Weights::kInt8 ? pack_kernel<Int8> : pack_kernel<BFloat16>)(w, in, out, packed);
  }
  static void run(const PackedLinear& w, const LinearInput& x, int64_t rows, int64_t first,
                  int64_t last, Activation activation, const float* residual, float* y,
                  int64_t stride, Upcoming upcoming) {
    (w.kind == Weights::kInt8 ? run_kernel<Int8> : run_kernel<BFloat16>)(w, x, rows, first, last,
                                                                         activation, residual, y,
                                                                         stride, upcoming);
  }
  static const LinearTable* table(const char* name) {
    static const LinearTable table = {name,           &packed_bytes, &pack, &quantized_stride,
                                      &quantize_rows, &run};
    return &table;
  }
};

}  // namespace fastbert::FASTBERT_ISA
