// The packed form of weights that the vector kernels share.
//
// A piece holds 64 columns (output channels) and all of K, in panels of P columns. Its unit is a word of 32 bits: four int8
// or two bf16 with consecutive k of one column. Words lie as [64 / P][words][P], the P columns of a
// panel being what a tile of the kernel keeps in registers: a panel is read from its first byte to
// its last, one vector a load. What K or N lack of whole words and pieces is zeros.
#pragma once

#include <algorithm>

#include "linear.h"
#include "microkernel.h"
#include "parallel.h"

namespace fastbert::FASTBERT_ISA {

/// Words of one column.
template <class Weight>
FASTBERT_INLINE int64_t word_count(int64_t in) {
  constexpr int64_t kPerWord = 4 / sizeof(Weight);
  return (in + kPerWord - 1) / kPerWord;
}

/// Size of `columns` columns.
template <class Weight>
FASTBERT_INLINE int64_t packed_bytes(int64_t columns, int64_t in) {
  return columns * word_count<Weight>(in) * 4;
}

/// w (columns × in) as panels of P for `most` columns, of which the last ones may be missing.
template <int64_t P, class Weight>
void pack_words(const Weight* w, int64_t in, int64_t columns, int64_t most, void* packed) {
  if (in == 0) return;
  const int64_t words = word_count<Weight>(in);
  // Words only pass through float vectors: no instruction on the way looks at their value.
  float* padded = thread_scratch<float>(Scratch::kLinear, most * words);
  __builtin_memset(padded, 0, packed_bytes<Weight>(most, in));
  for (int64_t column = 0; column < columns; ++column) {
    __builtin_memcpy(padded + column * words, w + column * in, in * sizeof(Weight));
  }
  pack_transposed<float, P>(padded, words, most, words, static_cast<float*>(packed));
}

/// Brings the next piece into L2 while the tiles of this one are computed, a slice a tile. (From
/// L3, or from memory, one core reads at a fraction of the rate at which it multiplies, and
/// hardware looks ahead by a page at most: without this, the first tile of every piece waits for
/// it.)
class Ahead {
 public:
  /// `bytes` from `begin` on, in `steps` steps.
  FASTBERT_INLINE Ahead(const char* begin, int64_t bytes, int64_t steps)
      : next_(begin), stride_(bytes / std::max<int64_t>(steps, 1)) {}

  /// One for each kBytes of this piece, as they are used. Where tiles are many, the steps of a line
  /// repeat it: that costs a load, which is spare, where a branch that depends on the step would be
  /// mispredicted.
  template <int64_t kBytes>
  FASTBERT_INLINE void step() {
    constexpr int64_t kLine = 64;
    __builtin_prefetch(next_, 0, 2);
    if (stride_ > kLine) {
      for (int64_t line = 1; line < kBytes / kLine; ++line) {
        __builtin_prefetch(next_ + line * kLine, 0, 2);
      }
    }
    next_ += stride_;
  }

 private:
  const char* next_;
  int64_t stride_;
};

/// Ends a step in the eyes of the compiler, for one accumulator. Left to itself it starts the next
/// one early, and has to keep what is not finished in memory: a tile leaves no register free.
template <class V>
FASTBERT_INLINE void settle([[maybe_unused]] V& sum) {
#if defined(__x86_64__)
  asm("" : "+v"(sum));
#endif
}

/// body(word) for the words [first, last) of a panel of P columns.
template <int64_t P, class Body>
FASTBERT_INLINE void for_words(int64_t first, int64_t last, Ahead& ahead, Body body) {
  Ahead local = ahead;  // in registers
  for (int64_t word = first; word < last; ++word) {
    local.step<4 * P>();
    body(word);
  }
  ahead = local;
}

/// Kernel::tile_rows<count>, for count from 1 to kRows.
template <class Kernel, int kRows = Kernel::kTileRows>
FASTBERT_INLINE auto tile_of(int64_t count) {
  if constexpr (kRows > 1) {
    if (count < kRows) return tile_of<Kernel, kRows - 1>(count);
  }
  return &Kernel::template tile_rows<kRows>;
}

/// The accumulators of a tile -> sums.
template <int kRows, int kVectors>
FASTBERT_INLINE void store_tile(const IntVec<float> (&acc)[kRows][kVectors], int32_t* sums) {
  constexpr int64_t L = kLanes<float>;
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_raw(sums + (i * kVectors + j) * L, acc[i][j]);
  }
}

}  // namespace fastbert::FASTBERT_ISA
