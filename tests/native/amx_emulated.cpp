// The Linear kernels for AMX on emulated tiles, for test_cpu_linear_units.py to call. Compiled by it,
// with FASTBERT_AMX_TILES='"amx_tiles_emulated.h"'.
#include "cpu/linear_amx.cpp"

using fastbert::Activation;
using fastbert::Weights;

extern "C" {

int64_t packed_bytes(int kind, int64_t in, int64_t out) {
  return fastbert::linear_amx::linear_table()->packed_bytes(static_cast<Weights>(kind), in, out);
}

void pack(int kind, const void* w, int64_t in, int64_t out, void* packed) {
  fastbert::linear_amx::linear_table()->pack(static_cast<Weights>(kind), w, in, out, packed);
}

int64_t quantized_stride(int64_t in) {
  return fastbert::linear_amx::linear_table()->quantized_stride(in);
}

/// `zeros`: as many as there are columns (in whole pieces) or rows; so are the scales.
void run(int kind, int64_t in, int64_t out, const void* weights, const float* w_scale,
         const float* zeros, const int8_t* quantized, const float* x_scale, const float* values,
         int64_t rows, int64_t first, int64_t last, float* y) {
  const bool int8 = static_cast<Weights>(kind) == Weights::kInt8;
  fastbert::linear_amx::linear_table()->run(
      {static_cast<Weights>(kind), in, out, weights, w_scale, zeros, zeros},
      {int8 ? quantized : nullptr, x_scale, zeros, values}, rows, first, last, Activation::kNone,
      nullptr, y, out, {nullptr, 0});
}

}  // extern "C"
