// Attention forward on tensor cores (mma.sync, sm_80 and later) in bf16 and fp16, after
// FlashAttention-2 (Dao 2023, algorithm 1): a block takes a tile of queries of one head and
// sequence, walks over the keys in tiles of 64, and keeps scores, probabilities and output in
// registers.
#pragma once

#include "attention_tile.cuh"

namespace fastbert::cuda {

/// Sizes of a block's work, and where its rows lie in shared memory.
template <typename T, int kHeadDim>
struct AttentionTile {
  static_assert(sizeof(T) == 2 && (kHeadDim == 32 || kHeadDim % 64 == 0));
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  // 16-row MMA tiles a warp: two share every key and value fragment, which halves the traffic from
  // shared memory; at 128 dimensions there are registers for one.
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  // A bound on registers, 255: left to itself ptxas spills some to fit a third block.
  static constexpr int kBlocksPerSM = 2;
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kKeys = 64;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kChunks = kRowBytes / 16;  // 16-byte chunks of a row
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  // Queries (later the output), then two stages of keys and values.
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;
  static constexpr int kKeyGroups = kKeys / 16;
  static constexpr int kDimGroups = kHeadDim / 16;

  /// Byte offset of a chunk. ldmatrix reads the same chunk of 8 rows at once: the rotation by the
  /// row puts them in different banks.
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    const int rotation = kHeadDim == 32 ? (row >> 1) & 3 : row & 7;
    return row * kRowBytes + ((chunk ^ rotation) << 4);
  }
};

template <typename T, int kHeadDim, bool kDropout>
__global__ void __launch_bounds__(AttentionTile<T, kHeadDim>::kThreads,
                                  AttentionTile<T, kHeadDim>::kBlocksPerSM)
    attention_fwd_mma_kernel(const AttentionForward p) {
  using Tile = AttentionTile<T, kHeadDim>;
  constexpr int kRowTiles = Tile::kRowTiles;
  const AttentionBlock block(p);
  const int first_query = block.tile * Tile::kQueries;
  if (first_query >= block.length) return;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;  // the lane's row and column in MMA tiles
  const int64_t stride = AttentionBlock::row_stride(p);
  const T* queries = block.input<T>(p, 0);
  const T* keys = block.input<T>(p, 1);
  unsigned char* memory = dynamic_shared_memory();
  const uint32_t query_shared = shared_address(memory);
  const uint32_t key_shared = query_shared + Tile::kQueryBytes;  // stage s: + 2 s kKeyBytes
  const Philox philox(p.dropout);

  const auto copy_keys = [&](int tile) {
    const int first = tile * Tile::kKeys;
    const uint32_t shared = key_shared + (tile & 1) * 2 * Tile::kKeyBytes;
    const auto to_row = [](int key) { return key_row(key); };
    const T* from = keys + first * stride;
    const int valid = block.length - first;
    copy_rows<Tile, Tile::kKeys>(shared, from, stride, valid, to_row);
    from += p.heads * kHeadDim;  // values follow keys
    copy_rows<Tile, Tile::kKeys>(shared + Tile::kKeyBytes, from, stride, valid, to_row);
  };
  copy_rows<Tile, Tile::kQueries>(query_shared, queries + first_query * stride, stride,
                                  block.length - first_query, [](int row) { return row; });
  copy_keys(0);
  cp_async_commit();

  // A warp without queries copies its share and keeps the barriers, nothing else.
  const int warp_row = warp * Tile::kWarpQueries;
  const bool has_queries = first_query + warp_row < block.length;
  const float scale_log2 = p.softmax_scale * kLog2E;

  float out[kRowTiles][kHeadDim / 8][4] = {};
  SoftmaxRows rows[kRowTiles];
  const int tiles = (block.length + Tile::kKeys - 1) / Tile::kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here for every thread, and the other stage is no longer read
    if (tile + 1 < tiles) copy_keys(tile + 1);
    cp_async_commit();
    if (!has_queries) continue;

    // S = Q Kᵀ. ldmatrix gives keys 0–7 and 8–15 of a group of 16, each in two halves of 8
    // dimensions.
    const uint32_t shared = key_shared + (tile & 1) * 2 * Tile::kKeyBytes;
    float scores[kRowTiles][Tile::kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < Tile::kDimGroups; ++d) {
      // Loaded again for each tile: kept, all of them would be registers that are not there.
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = warp_row + 16 * i + lane % 16;
        ldmatrix_x4(q[i], query_shared + Tile::offset(row, 2 * d + lane / 16));
      }
#pragma unroll
      for (int m = 0; m < Tile::kKeyGroups; ++m) {
        uint32_t k[4];
        const int row = 16 * m + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(k, shared + Tile::offset(row, 2 * d + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<T>(scores[i][2 * m], q[i], k[0], k[1]);
          mma_m16n8k16<T>(scores[i][2 * m + 1], q[i], k[2], k[3]);
        }
      }
    }

    const int first_key = tile * Tile::kKeys;
    const int valid_keys = block.length - first_key;
    if (valid_keys < Tile::kKeys) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) mask_ragged_end(scores[i], valid_keys, t);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      float factors[2];
      raise_maxima(scores[i], rows[i], factors, scale_log2);
      rescale_rows(out[i], factors);
      exponentiate(scores[i], rows[i], scale_log2);
    }

    // O += P V.
#pragma unroll
    for (int m = 0; m < Tile::kKeyGroups; ++m) {
      uint32_t probabilities[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (kDropout) {
          const int token = block.start + first_query + warp_row + 16 * i + g;
          drop_probabilities(scores[i][2 * m], scores[i][2 * m + 1], philox, p.dropout.threshold,
                             first_key / 4 + 4 * m + t, token, block.head);
        }
        as_left_operand<T>(probabilities[i], scores[i][2 * m], scores[i][2 * m + 1]);
      }
#pragma unroll
      for (int d = 0; d < Tile::kDimGroups; ++d) {
        uint32_t v[4];
        ldmatrix_x4_transposed(
            v, shared + Tile::kKeyBytes + Tile::offset(16 * m + lane % 16, 2 * d + lane / 16));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<T>(out[i][2 * d], probabilities[i], v[0], v[1]);
          mma_m16n8k16<T>(out[i][2 * d + 1], probabilities[i], v[2], v[3]);
        }
      }
    }
  }
  if (!has_queries) return;

  // Through this warp's own rows of the query memory.
  const int valid_queries = block.length - first_query;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    finish_rows<Tile, T>(memory, out[i], rows[i], warp_row + 16 * i, valid_queries, p.softmax_scale,
                         p.dropout.scale, block.lse(p, first_query));
  }
  store_rows<Tile, Tile::kWarpQueries>(memory, block.output<T>(p, first_query),
                                       AttentionBlock::output_stride(p), warp_row, valid_queries);
}

}  // namespace fastbert::cuda
