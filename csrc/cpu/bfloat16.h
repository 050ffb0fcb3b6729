// bf16 outside the units of an ISA, where vec.h has its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastbert {

/// The bits of the nearest bf16, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16);
}

}  // namespace fastbert
