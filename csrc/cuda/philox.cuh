// Dropout as a pure function of a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011,
// "Parallel random numbers: as easy as 1, 2, 3"), the same bits as every other backend.
//
//   key = (seed low, seed high), counter = (col / 4, row, offset, plane), word = output[col % 4];
//   an element is kept iff word >= floor(p · 2³²); kept values are multiplied by 1 / (1 − p).
#pragma once

#include <cmath>

#include "types.cuh"

namespace fastbert::cuda {

/// What the host knows of a dropout; `seed` is read by the kernel.
struct Dropout {
  const int64_t* seed;
  uint32_t offset;     // the site: one number for each place in the model that drops
  uint32_t threshold;  // floor(p · 2³²)
  float scale;         // 1 / (1 − p)
  bool active;         // false: p is 0, nothing is drawn
};

inline Dropout make_dropout(double p, const int64_t* seed, int64_t offset, const char* op) {
  if (!(p >= 0.0 && p < 1.0)) {
    throw std::invalid_argument(std::string(op) + ": dropout_p is " + std::to_string(p) +
                                ", expected 0 <= dropout_p < 1");
  }
  if (p > 0.0 && seed == nullptr) {
    throw std::invalid_argument(std::string(op) + ": dropout_seed is missing with dropout_p > 0");
  }
  const double two32 = 4294967296.0;
  return {seed, static_cast<uint32_t>(offset), static_cast<uint32_t>(std::floor(p * two32)),
          static_cast<float>(1.0 / (1.0 - p)), p > 0.0};
}

/// The stream of one dropout site on the device.
class Philox {
 public:
  __device__ __forceinline__ explicit Philox(const Dropout& dropout)
      : offset_(dropout.offset), key_x_(0), key_y_(0) {
    if (dropout.active) {
      const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
      key_x_ = static_cast<uint32_t>(seed);
      key_y_ = static_cast<uint32_t>(seed >> 32);
    }
  }

  /// The words of columns 4·group … 4·group + 3.
  __device__ __forceinline__ uint4 words(uint32_t group, uint32_t row, uint32_t plane) const {
    uint4 counter = make_uint4(group, row, offset_, plane);
    uint32_t key_x = key_x_, key_y = key_y_;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t product_x = static_cast<uint64_t>(0xD2511F53u) * counter.x;
      const uint64_t product_z = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
      counter = make_uint4(static_cast<uint32_t>(product_z >> 32) ^ counter.y ^ key_x,
                           static_cast<uint32_t>(product_z),
                           static_cast<uint32_t>(product_x >> 32) ^ counter.w ^ key_y,
                           static_cast<uint32_t>(product_x));
      key_x += 0x9E3779B9u;
      key_y += 0xBB67AE85u;
    }
    return counter;
  }

  /// The word of one column.
  __device__ __forceinline__ uint32_t word(uint32_t col, uint32_t row, uint32_t plane) const {
    const uint4 four = words(col / 4, row, plane);
    const uint32_t low = col & 1 ? four.y : four.x;
    const uint32_t high = col & 1 ? four.w : four.z;
    return col & 2 ? high : low;
  }

 private:
  uint32_t offset_, key_x_, key_y_;
};

/// values[i] · (kept ? scale : 0) for columns col … col + kWidth − 1 of a hidden state (plane 0).
/// `col` is a multiple of kWidth.
template <int kWidth>
__device__ __forceinline__ void drop_hidden(const Philox& philox, const Dropout& dropout,
                                            uint32_t row, uint32_t col, float (&values)[kWidth]) {
  const auto drop = [&](float value, uint32_t word) {
    return word >= dropout.threshold ? value * dropout.scale : 0.0f;
  };
  if constexpr (kWidth == 1) {
    values[0] = drop(values[0], philox.word(col, row, 0));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const uint4 words = philox.words((col + i) / 4, row, 0);
      values[i] = drop(values[i], words.x);
      values[i + 1] = drop(values[i + 1], words.y);
      values[i + 2] = drop(values[i + 2], words.z);
      values[i + 3] = drop(values[i + 3], words.w);
    }
  }
}

}  // namespace fastbert::cuda
