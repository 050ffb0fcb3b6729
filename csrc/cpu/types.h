// Storage types and dtype codes shared by every CPU translation unit. Plain data only: anything with
// code in it lives in a per-ISA namespace (vec.h), so that no instruction of a wide ISA can leak.
#pragma once

#include <cstdint>

namespace fastbert {

/// bfloat16 as stored: the upper 16 bits of an IEEE float.
struct bf16 {
  uint16_t bits;
};

/// Element type codes, as Python passes them.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

}  // namespace fastbert
