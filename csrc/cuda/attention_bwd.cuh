// What the attention backward kernels share: their arguments, and the products of the two that run
// on tensor cores.
#pragma once

#include "attention.cuh"
#include "attention_mma.cuh"

namespace fastbert::cuda {

/// As in attention_bwd() of ops.h.
struct AttentionBackward {
  const void* dout;
  const void* qkv;
  const void* out;
  const float* lse;
  const int32_t* cu_seqlens;
  void* dqkv;
  float* delta;
  int64_t tokens;
  int heads, head_dim;
  int tiles;  // blocks a (sequence, head)
  float softmax_scale;
  Dropout dropout;
};

/// A block's rows of the tensors that only backward has. Vectors of dout and out are
/// `out_stride` apart, those of dqkv as far as those of qkv.
struct AttentionBackwardBlock : AttentionBlock {
  __device__ __forceinline__ explicit AttentionBackwardBlock(const AttentionBackward& p)
      : AttentionBlock(p.cu_seqlens, p.heads, p.tiles) {}

  /// The first vector of the sequence in a (T, N, D) tensor: dout or out.
  template <typename T>
  __device__ __forceinline__ const T* output(const AttentionBackward& p, const void* tensor) const {
    return static_cast<const T*>(tensor) +
           (static_cast<int64_t>(start) * p.heads + head) * p.head_dim;
  }
  __device__ __forceinline__ static int64_t out_stride(const AttentionBackward& p) {
    return static_cast<int64_t>(p.heads) * p.head_dim;
  }

  /// The first gradient of the sequence: of the queries (0), keys (1) or values (2).
  template <typename T>
  __device__ __forceinline__ T* gradient(const AttentionBackward& p, int which) const {
    const int64_t row = static_cast<int64_t>(start) * 3 + which;
    return static_cast<T*>(p.dqkv) + (row * p.heads + head) * p.head_dim;
  }

  /// Where lse and delta (N, T) of the sequence begin.
  __device__ __forceinline__ int64_t statistics(const AttentionBackward& p) const {
    return head * p.tokens + start;
  }
};

/// delta_i = dout_i · out_i of `count` queries from `first` on, 0 past the end of the sequence:
/// write(i − first, delta_i), by one thread each. Called by the whole block.
template <typename T, int kHeadDim, int kThreads, typename Write>
__device__ __forceinline__ void row_deltas(const AttentionBackward& p,
                                           const AttentionBackwardBlock& block, int first,
                                           int count, Write write) {
  constexpr int kLanes = kHeadDim / 8;  // of a row, with 16 bytes each
  const int thread = reread_thread_index(), lane = thread % kLanes;
  for (int begin = 0; begin < count; begin += kThreads / kLanes) {
    const int row = begin + thread / kLanes;
    float delta = 0.0f;
    if (row < count && first + row < block.length) {
      const int64_t at =
          (first + row) * AttentionBackwardBlock::out_stride(p) + static_cast<int64_t>(lane) * 8;
      float dout[8], out[8];
      load(block.output<T>(p, p.dout) + at, dout);
      load(block.output<T>(p, p.out) + at, out);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += dout[i] * out[i];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      delta += __shfl_xor_sync(kFullWarp, delta, distance);
    }
    if (lane == 0 && row < count) write(row, delta);
  }
}

/// Where this lane points ldmatrix, in rows of kHeadDim elements that are swizzled as in
/// AttentionTile. Rows 8 further are a constant away, and the pair of chunks `d` further differs in
/// the bits of `d` alone: so a few registers serve every matrix of a tile.
template <typename T, int kHeadDim>
struct LaneAddress {
  using Tile = AttentionTile<T, kHeadDim>;
  uint32_t base;
  int offset;  // known to the compiler

  /// For rows as they stand: of a left operand, or, transposed, of a right one whose rows are k.
  __device__ __forceinline__ static LaneAddress by_rows(uint32_t shared) {
    const int lane = threadIdx.x % kWarpSize;
    return {shared + Tile::offset(lane % 16, lane / 16), 0};
  }
  /// For a right operand whose rows are columns.
  __device__ __forceinline__ static LaneAddress by_columns(uint32_t shared) {
    const int lane = threadIdx.x % kWarpSize;
    return {shared + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2), 0};
  }
  __device__ __forceinline__ LaneAddress operator+(int bytes) const {
    return {base, offset + bytes};
  }
  __device__ __forceinline__ LaneAddress rows(int count) const {
    return *this + count * Tile::kRowBytes;
  }
  __device__ __forceinline__ uint32_t dims(int d) const { return (base ^ d << 5) + offset; }
};

/// sums += a · bᵀ for 16 of the head's dimensions: a in registers, 8 kColTiles rows of `b` at an
/// address by columns.
template <typename T, int kHeadDim, int kRowTiles, int kColTiles>
__device__ __forceinline__ void multiply_dims(float (&sums)[kRowTiles][kColTiles][4],
                                              const uint32_t (&a)[kRowTiles][4],
                                              LaneAddress<T, kHeadDim> b, int d) {
#pragma unroll
  for (int j = 0; j < kColTiles; j += 2) {
    uint32_t right[4];
    ldmatrix_x4(right, b.rows(8 * j).dims(d));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      mma_m16n8k16<T>(sums[i][j], a[i], right[0], right[1]);
      mma_m16n8k16<T>(sums[i][j + 1], a[i], right[2], right[3]);
    }
  }
}

/// sums += a · bᵀ over the head dimension, a warp's 16 kRowTiles rows of `a` and 8 kColTiles rows of
/// `b` in shared memory: addresses by rows and by columns.
template <typename T, int kHeadDim, int kRowTiles, int kColTiles>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRowTiles][kColTiles][4],
                                              LaneAddress<T, kHeadDim> a,
                                              LaneAddress<T, kHeadDim> b) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) ldmatrix_x4(left[i], a.rows(16 * i).dims(d));
    multiply_dims(sums, left, b, d);
  }
}

/// sums += a · b, a a warp's 16 kRowTiles × 16 matrix in registers, b 16 rows of shared memory: an
/// address by rows.
template <typename T, int kHeadDim, int kRowTiles>
__device__ __forceinline__ void multiply_by_rows(float (&sums)[kRowTiles][kHeadDim / 8][4],
                                                 const uint32_t (&a)[kRowTiles][4],
                                                 LaneAddress<T, kHeadDim> b) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t right[4];
    ldmatrix_x4_transposed(right, b.dims(d));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      mma_m16n8k16<T>(sums[i][2 * d], a[i], right[0], right[1]);
      mma_m16n8k16<T>(sums[i][2 * d + 1], a[i], right[2], right[3]);
    }
  }
}

/// Writes scale · sums, a warp's 16 kRowTiles rows, through its own rows of shared memory (from
/// `warp_row` on) to store 16 bytes a lane. Row i goes to `to` + position(i) · stride where that
/// position, counted in the sequence, is below `length`.
template <typename T, int kHeadDim, int kRowTiles, typename Position>
__device__ __forceinline__ void store_rows(const float (&sums)[kRowTiles][kHeadDim / 8][4],
                                           float scale, unsigned char* memory, int warp_row, T* to,
                                           int64_t stride, int length, Position position) {
  using Tile = AttentionTile<T, kHeadDim>;
  const int lane = reread_thread_index() % kWarpSize, g = lane / 4, t = lane % 4;
  __syncwarp();  // the warp has read what stood here
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int row = warp_row + 16 * i + 8 * r + g;
        *reinterpret_cast<uint32_t*>(memory + Tile::offset(row, j) + 4 * t) =
            pack2<T>(sums[i][j][2 * r] * scale, sums[i][j][2 * r + 1] * scale);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * kRowTiles * Tile::kChunks; i += kWarpSize) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (position(row) < length) {
      Packed<T, 8> packed;
      packed.load(reinterpret_cast<const T*>(memory + Tile::offset(warp_row + row, chunk)));
      packed.store(to + position(row) * stride + chunk * 8);
    }
  }
}

}  // namespace fastbert::cuda
