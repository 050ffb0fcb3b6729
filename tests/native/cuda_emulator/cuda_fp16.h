// __half on the host: storage and the conversions that the kernels use.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(1024 + fraction),
                                                     static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

/// Nearest even: scaled so that the unit in the last place is 1, the host's own rounding decides.
inline __half __float2half_rn(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  if (x != x) return {0x7fff};
  int exponent;
  std::frexp(x, &exponent);
  const int ulp = std::max(exponent - 11, -24);  // 2^ulp; subnormals share the smallest
  const float units = std::nearbyint(std::ldexp(std::fabs(x), -ulp));
  const float magnitude = std::isinf(x) ? INFINITY : std::ldexp(units, ulp);
  if (magnitude > 65504.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 6.103515625e-05f) {
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(magnitude, 24)))};
  }
  const int e = std::ilogb(magnitude);
  const auto fraction = static_cast<uint16_t>(std::ldexp(magnitude, 10 - e) - 1024.0f);
  return {static_cast<uint16_t>(sign | (e + 15) << 10 | fraction)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
