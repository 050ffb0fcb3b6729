// Attention forward on tensor cores (mma.sync, sm_80 and later) in bf16 and fp16, after
// FlashAttention-2 (Dao 2023, algorithm 1): a block takes a tile of queries of one head and
// sequence, walks over the keys in tiles of 64, and keeps scores, probabilities and output in
// registers.
#pragma once

#include "attention.cuh"

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

  /// The shared row of a key (or value) of the tile. In the MMA's layout a lane holds columns 2t,
  /// 2t + 1 of each 8: stored in this order they are keys 4t … 4t + 3 of each 16, whose four
  /// dropout words are one Philox block. Softmax and P·V do not care about the order, as long as
  /// keys and values share it.
  __device__ __forceinline__ static int key_row(int key) {
    return (key & ~15) | (key & 2) << 2 | (key & 12) >> 1 | (key & 1);
  }
};

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

/// The running softmax of the two rows of a 16-row MMA tile that a lane has a part of.
struct SoftmaxRows {
  // Of the unscaled scores; the same in the row's 4 lanes.
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // this lane's part only
};

/// Replaces scores by exp(scale · (s − maximum)), unnormalised probabilities in fp32, and rescales
/// what was summed under the former maximum. scores[j][2 r + e] is of row r and, in the tile, of key
/// 16 (j / 2) + 4t + 2 (j % 2) + e.
template <int kScoreTiles, int kOutTiles>
__device__ __forceinline__ void online_softmax(float (&scores)[kScoreTiles][4],
                                               float (&out)[kOutTiles][4], SoftmaxRows& rows,
                                               float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float maximum = rows.maximum[r];
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      maximum = fmaxf(maximum, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 2));
    // The first time 2^-inf = 0 times zeros. The maximum is finite: every tile has a key.
    const float rescale = exp2_approx((rows.maximum[r] - maximum) * scale_log2);
    rows.maximum[r] = maximum;
    rows.sum[r] *= rescale;
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      out[j][2 * r] *= rescale;
      out[j][2 * r + 1] *= rescale;
    }
    const float shift = maximum * scale_log2;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = exp2_approx(scores[j][2 * r + e] * scale_log2 - shift);
        scores[j][2 * r + e] = p;
        rows.sum[r] += p;
      }
    }
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
    const auto to_row = [](int key) { return Tile::key_row(key); };
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
  const float scale_log2 = p.softmax_scale * 1.4426950408889634f;  // exp(x) = 2^(x log2 e)

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
    if (block.length - first_key < Tile::kKeys) {
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = first_key + 16 * (j / 2) + 4 * t + 2 * (j % 2) + e;
          if (key >= block.length) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              scores[i][j][e] = -INFINITY;
              scores[i][j][2 + e] = -INFINITY;
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) online_softmax(scores[i], out[i], rows[i], scale_log2);

    // O += P V. The scores of two 8-key tiles are, rounded, the left operand of one MMA.
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
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&s)[4] = scores[i][2 * m + half];
          probabilities[i][2 * half] = pack2<T>(s[0], s[1]);
          probabilities[i][2 * half + 1] = pack2<T>(s[2], s[3]);
        }
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

  // Normalise, and write through this warp's own rows of the query memory to store 16 bytes a lane.
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows[i].sum[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int row = warp_row + 16 * i + 8 * r + g;
      if (t == 0 && first_query + row < block.length) {
        *block.lse(p, first_query + row) = rows[i].maximum[r] * p.softmax_scale + logf(sum);
      }
      const float scale = p.dropout.scale / sum;  // 1 / (1 − p), or 1 without dropout
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(memory + Tile::offset(row, j) + 4 * t) =
            pack2<T>(out[i][j][2 * r] * scale, out[i][j][2 * r + 1] * scale);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < Tile::kWarpQueries * Tile::kChunks; i += kWarpSize) {
    const int row = warp_row + i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (first_query + row < block.length) {
      Packed<T, 8> packed;
      packed.load(reinterpret_cast<const T*>(memory + Tile::offset(row, chunk)));
      packed.store(block.output<T>(p, first_query + row) + chunk * 8);
    }
  }
}

}  // namespace fastbert::cuda
