// Linear layers with weights packed once: what the inference engine is built from.
//
//   y[t, n] = act( Σ_k x[t, k] · w[n, k] + bias[n] )
//
// with bf16 weights as it stands there. int8 weights are w[n, k] ≈ w_scale[n] · q_w[n, k], and
// x[t, k] ≈ x_scale[t] · q_x[t, k] + x_offset[t], so that the sum is
//
//   float(Σ_k q_x[t, k] · q_w[n, k]) · (x_scale[t] · w_scale[n]) + x_offset[t] · column_sum[n]
//   column_sum[n] = w_scale[n] · float(Σ_k q_w[n, k])
//
// One unit of kernels an instruction set (linear_amx.cpp, linear_avx512_vnni.cpp, …) fills a
// LinearTable. Kernels run on the calling thread; the engine cuts the work into rows and columns.
// An element's value depends on its own row and column only: not on how the work was cut.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace fastbert {

enum class Weights : int { kInt8 = 0, kBFloat16 = 1 };

enum class Activation : int {
  kNone = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kRelu = 3,
  kSilu = 4,
  kTanh = 5
};

/// Columns are handed out in multiples of this many, whatever the unit: 64 columns of packed
/// weights, with all of K, are one contiguous piece.
constexpr int64_t kColumnBlock = 64;

/// One packed Linear, as a unit's pack() left it. The engine owns the memory.
struct PackedLinear {
  Weights kind;
  int64_t in;           // K
  int64_t out;          // N
  const void* weights;  // packed_bytes(kind, in, out), 64-byte aligned
  // (N) padded with zeros to a multiple of kColumnBlock. int8 weights only, but for the bias:
  const float* scale;       // w_scale
  const float* column_sum;  // sum_columns()
  const float* bias;        // zeros where there is none
};

/// column_sum of w, (out × in) row-major.
inline void sum_columns(const int8_t* w, const float* scale, int64_t in, int64_t out, float* sums) {
  for (int64_t n = 0; n < out; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; k < in; ++k) sum += w[n * in + k];
    sums[n] = scale[n] * static_cast<float>(sum);
  }
}

/// Where the rows of x come from. int8: `quantized` with leading dimension quantized_stride(in),
/// each row padded with zeros from `in` to it, and `scale` and `offset`, one a row. bf16: `values`,
/// fp32, leading dimension `in`.
struct LinearInput {
  const int8_t* quantized;
  const float* scale;
  const float* offset;
  const float* values;
};

/// Packed weights that the caller multiplies by next.
struct Upcoming {
  const char* begin;
  int64_t bytes;
};

struct LinearTable {
  const char* name;

  /// Bytes that pack() writes for an (out × in) matrix.
  size_t (*packed_bytes)(Weights kind, int64_t in, int64_t out);

  /// Packs `w`, (out × in) row-major int8 or bf16, into `packed`.
  void (*pack)(Weights kind, const void* w, int64_t in, int64_t out, void* packed);

  /// Distance in bytes between rows of a quantised activation of `in` channels: a multiple of 64.
  int64_t (*quantized_stride)(int64_t in);

  /// Rows of fp32 (rows × cols, leading dimension cols) to int8 from -127 to 127, by row.
  /// `fixed_scale` > 0: that scale for all rows (saturating) and no offset; 0: each row's own, so
  /// that its least value becomes -127 and its largest 127. Pads each row with zeros. A row with an
  /// infinity or a NaN gets the scale NaN, so that its outputs become NaN.
  void (*quantize_rows)(const float* x, int64_t rows, int64_t cols, float fixed_scale, int8_t* q,
                        float* scale, float* offset);

  /// y[0 … rows) × [first, last): columns `first` (a multiple of kColumnBlock) up to `last` (such a
  /// multiple or out) of y (rows × out, leading dimension `stride`, fp32). `residual`, unless null,
  /// is added after the activation (same leading dimension; it may be y itself). `upcoming` is
  /// brought into L2 during the last kColumnBlock columns.
  void (*run)(const PackedLinear& w, const LinearInput& x, int64_t rows, int64_t first,
              int64_t last, Activation activation, const float* residual, float* y, int64_t stride,
              Upcoming upcoming);
};

/// The table of the instruction set in use (dispatch.h chooses).
const LinearTable& linear_kernels();

}  // namespace fastbert
