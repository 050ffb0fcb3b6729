// Rows of memory in 16-byte accesses. A kernel is compiled for kVectorWidth<T> elements a thread
// and, for pointers or row widths that do not allow it, for 1.
#pragma once

#include "primitives.cuh"
#include "types.cuh"

namespace fastbert::cuda {

/// Elements in 16 bytes.
template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

/// kWidth consecutive elements as loaded, not yet converted: half the registers of fp32 for 16-bit
/// types, so that a thread can have several loads in flight.
template <typename T, int kWidth>
struct Packed {
  static_assert(sizeof(T) * kWidth == 16, "one 16-byte access");
  uint4 words;

  __device__ __forceinline__ void load(const T* from) {
    words = *reinterpret_cast<const uint4*>(from);
  }
  /// For memory that nothing writes while the kernel runs: may be moved ahead of stores.
  __device__ __forceinline__ void load_read_only(const T* from) {
    words = __ldg(reinterpret_cast<const uint4*>(from));
  }
  __device__ __forceinline__ void store(T* to) const { store_global16(to, words); }
  __device__ __forceinline__ void clear() { words = make_uint4(0u, 0u, 0u, 0u); }

  __device__ __forceinline__ void unpack(float (&values)[kWidth]) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = __uint_as_float(word[i]);
      } else {
        const float2 pair = unpack2<T>(word[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&values)[kWidth]) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(values[i]);
      } else {
        word[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    words = make_uint4(word[0], word[1], word[2], word[3]);
  }
};

template <typename T>
struct Packed<T, 1> {
  T value;

  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void load_read_only(const T* from) { value = __ldg(from); }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void clear() { value = from_float<T>(0.0f); }
  __device__ __forceinline__ void unpack(float (&values)[1]) const { values[0] = to_float(value); }
  __device__ __forceinline__ void pack(const float (&values)[1]) {
    value = from_float<T>(values[0]);
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ void load(const T* from, float (&values)[kWidth]) {
  Packed<T, kWidth> packed;
  packed.load(from);
  packed.unpack(values);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* to, const float (&values)[kWidth]) {
  Packed<T, kWidth> packed;
  packed.pack(values);
  packed.store(to);
}

/// A vector of the model (bias, weight): of the activations' type T or fp32, known at run time
/// only. The branch is the same for the whole grid.
struct Parameter {
  const void* data;  // null: absent
  bool is_float32;

  template <typename T, int kWidth>
  __device__ __forceinline__ void load(int64_t index, float (&values)[kWidth]) const {
    if (is_float32) {
      load_as<float, kWidth>(index, values);
    } else {
      load_as<T, kWidth>(index, values);
    }
  }

 private:
  template <typename T, int kWidth>
  __device__ __forceinline__ void load_as(int64_t index, float (&values)[kWidth]) const {
    constexpr int kPart = kWidth == 1 ? 1 : kVectorWidth<T>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kPart) {
      Packed<T, kPart> packed;
      float part[kPart];
      packed.load_read_only(static_cast<const T*>(data) + index + i);
      packed.unpack(part);
#pragma unroll
      for (int j = 0; j < kPart; ++j) values[i + j] = part[j];
    }
  }
};

}  // namespace fastbert::cuda
