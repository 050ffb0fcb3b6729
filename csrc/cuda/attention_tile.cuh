// What the attention kernels on tensor cores share. To them all a tile is 16 rows of a warp, whose
// lanes have the same part of it under mma.sync and under wgmma: with g = lane / 4 and t = lane % 4,
// x[j][2 r + e] is of row g + 8 r and of column 8 j + 2 t + e.
#pragma once

#include "attention.cuh"

namespace fastbert::cuda {

/// The shared row of a key (or value) of the tile. A lane holds columns 2t, 2t + 1 of each 8: stored
/// in this order they are keys 4t … 4t + 3 of each 16, whose four dropout words are one Philox
/// block. Softmax and P·V do not care about the order, as long as keys and values share it.
__device__ __forceinline__ int key_row(int key) {
  return (key & ~15) | (key & 2) << 2 | (key & 12) >> 1 | (key & 1);
}

/// The key, in its tile, of element x[j][e] or x[j][2 + e].
__device__ __forceinline__ int key_of(int j, int e, int t) {
  return 16 * (j / 2) + 4 * t + 2 * (j % 2) + e;
}

/// Starts copying `kRows` rows from global memory; rows from `valid` on become zeros, so that the
/// P·V of a ragged end multiplies 0 with 0. `to_row` maps a row to its place.
template <typename Tile, int kRows, typename T, typename ToRow>
__device__ __forceinline__ void copy_rows(uint32_t shared, const T* from, int64_t stride, int valid,
                                          ToRow to_row, int thread = threadIdx.x) {
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kChunks;
  const int chunk = thread % Tile::kChunks;
  const int first = thread / Tile::kChunks;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const int row = first + i;
    const bool is_valid = row < valid;
    cp_async16(shared + Tile::offset(to_row(row), chunk),
               from + (is_valid ? row * stride : 0) + chunk * 8, is_valid);
  }
}

/// Takes the keys from `valid` on out of the softmax.
template <int kTiles>
__device__ __forceinline__ void mask_ragged_end(float (&scores)[kTiles][4], int valid, int t) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (key_of(j, e, t) >= valid) scores[j][e] = scores[j][2 + e] = -INFINITY;
    }
  }
}

/// The running softmax of the two rows of a tile that a lane has a part of.
struct SoftmaxRows {
  // Of the unscaled scores; the same in the row's 4 lanes.
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // this lane's part only
};

/// Raises the maxima to those of the scores, and gives the factors by which what was summed under
/// the former ones shrinks: rescale_rows().
template <int kTiles>
__device__ __forceinline__ void raise_maxima(const float (&scores)[kTiles][4], SoftmaxRows& rows,
                                             float (&factors)[2], float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float maximum = rows.maximum[r];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      maximum = fmaxf(maximum, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 2));
    // The first time 2^-inf = 0 times zeros. The maximum is finite: every tile has a key.
    factors[r] = exp2_approx((rows.maximum[r] - maximum) * scale_log2);
    rows.maximum[r] = maximum;
    rows.sum[r] *= factors[r];
  }
}

/// Replaces scores by exp(scale · (s − maximum)), unnormalised probabilities in fp32.
template <int kTiles>
__device__ __forceinline__ void exponentiate(float (&scores)[kTiles][4], SoftmaxRows& rows,
                                             float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float shift = rows.maximum[r] * scale_log2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = exp2_approx(scores[j][2 * r + e] * scale_log2 - shift);
        scores[j][2 * r + e] = p;
        rows.sum[r] += p;
      }
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void rescale_rows(float (&out)[kTiles][4], const float (&factors)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[j][i] *= factors[i / 2];
  }
}

/// Zeroes the dropped ones of a lane's probabilities of two rows, `token` and `token + 8`, and four
/// keys, the `group`-th four of the sequence: two in either 8-key tile.
__device__ __forceinline__ void drop_probabilities(float (&low)[4], float (&high)[4],
                                                   const Philox& philox, uint32_t threshold,
                                                   uint32_t group, uint32_t token, uint32_t head) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4 words = philox.words(group, token + 8 * r, head);
    if (words.x < threshold) low[2 * r] = 0.0f;
    if (words.y < threshold) low[2 * r + 1] = 0.0f;
    if (words.z < threshold) high[2 * r] = 0.0f;
    if (words.w < threshold) high[2 * r + 1] = 0.0f;
  }
}

/// The accumulators of two 8-column tiles, rounded, as the left operand of one product.
template <typename T>
__device__ __forceinline__ void as_left_operand(uint32_t (&a)[4], const float (&low)[4],
                                                const float (&high)[4]) {
  a[0] = pack2<T>(low[0], low[1]);
  a[1] = pack2<T>(low[2], low[3]);
  a[2] = pack2<T>(high[0], high[1]);
  a[3] = pack2<T>(high[2], high[3]);
}

/// Normalises the 16 output rows from `first_row` of the block on, into their places in `memory`,
/// and writes the lse of those among the `valid` rows of the block.
template <typename Tile, typename T, int kTiles>
__device__ __forceinline__ void finish_rows(unsigned char* memory, const float (&out)[kTiles][4],
                                            const SoftmaxRows& rows, int first_row, int valid,
                                            float softmax_scale, float dropout_scale, float* lse) {
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const int row = first_row + 8 * r + g;
    if (t == 0 && row < valid) lse[row] = rows.maximum[r] * softmax_scale + logf(sum);
    const float scale = dropout_scale / sum;  // 1 / (1 − p), or 1 without dropout
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      *reinterpret_cast<uint32_t*>(memory + Tile::offset(row, j) + 4 * t) =
          pack2<T>(out[j][2 * r] * scale, out[j][2 * r + 1] * scale);
    }
  }
}

/// Stores the warp's rows from `memory`, 16 bytes a lane, those among the `valid` rows of the block.
template <typename Tile, int kRows, typename T>
__device__ __forceinline__ void store_rows(const unsigned char* memory, T* to, int64_t stride,
                                           int first_row, int valid) {
  __syncwarp();
#pragma unroll
  for (int i = threadIdx.x % kWarpSize; i < kRows * Tile::kChunks; i += kWarpSize) {
    const int row = first_row + i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (row < valid) {
      Packed<T, 8> packed;
      packed.load(reinterpret_cast<const T*>(memory + Tile::offset(row, chunk)));
      packed.store(to + row * stride + chunk * 8);
    }
  }
}

}  // namespace fastbert::cuda
