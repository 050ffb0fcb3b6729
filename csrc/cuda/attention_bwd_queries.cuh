// dQ of attention by query tiles, on tensor cores (mma.sync, sm_80 and later) in bf16 and fp16: the
// first of two kernels for sequences too long for one block (attention_bwd_keys.cuh). As forward, a
// block walks over the keys in tiles of 64; scores are (queries, keys).
#pragma once

#include "attention_bwd.cuh"

namespace fastbert::cuda {

/// Sizes of a block's work, and where things lie in shared memory.
template <typename T, int kHeadDim>
struct QueryTile {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kBlocksPerSM = 2;  // a bound on registers, 255
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kKeys = 64;
  static constexpr int kKeysAtOnce = 32;  // scores and their gradients are registers
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  // Queries (later dQ) and dout, two stages of keys and values, delta.
  static constexpr int kStages = 2 * kQueryBytes;
  static constexpr int kDelta = kStages + 4 * kKeyBytes;
  static constexpr int kSharedBytes = kDelta + 4 * kQueries;

  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return AttentionTile<T, kHeadDim>::offset(row, chunk);
  }
};

/// dq_i = scale Σ_j ds_ij k_j; and delta, for the kernel that follows.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(QueryTile<T, kHeadDim>::kThreads,
                                  QueryTile<T, kHeadDim>::kBlocksPerSM)
    attention_bwd_queries_kernel(const AttentionBackward p) {
  using Tile = QueryTile<T, kHeadDim>;
  using Address = LaneAddress<T, kHeadDim>;
  constexpr int kRowTiles = Tile::kRowTiles, kColTiles = Tile::kKeysAtOnce / 8;
  const AttentionBackwardBlock block(p);
  const int first_query = block.tile * Tile::kQueries;
  if (first_query >= block.length) return;

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;  // the lane's row and column in MMA tiles
  const int64_t stride = AttentionBlock::row_stride(p);
  unsigned char* memory = dynamic_shared_memory();
  const uint32_t shared = shared_address(memory);
  const Philox philox(p.dropout);
  const float scale_log2 = p.softmax_scale * kLog2E;

  const auto copy_queries = [&](uint32_t to, const T* from, int64_t from_stride) {
    copy_rows<Tile, Tile::kQueries>(to, from + first_query * from_stride, from_stride,
                                    block.length - first_query, [](int row) { return row; });
  };
  const auto copy_keys = [&](int tile) {
    const auto to_row = [](int key) { return key_row(key); };
    const uint32_t to = shared + Tile::kStages + (tile & 1) * 2 * Tile::kKeyBytes;
    const T* keys = block.input<T>(p, 1) + tile * Tile::kKeys * stride;
    const int valid = block.length - tile * Tile::kKeys;
    copy_rows<Tile, Tile::kKeys>(to, keys, stride, valid, to_row);
    copy_rows<Tile, Tile::kKeys>(to + Tile::kKeyBytes, keys + p.heads * kHeadDim, stride, valid,
                                 to_row);
  };
  copy_queries(shared, block.input<T>(p, 0), stride);
  copy_queries(shared + Tile::kQueryBytes, block.output<T>(p, p.dout),
               AttentionBackwardBlock::out_stride(p));
  copy_keys(0);
  cp_async_commit();

  float* const deltas = reinterpret_cast<float*>(memory + Tile::kDelta);
  row_deltas<T, kHeadDim, Tile::kThreads>(p, block, first_query, Tile::kQueries,
                                          [&](int row, float delta) {
                                            deltas[row] = delta;
                                            const int query = first_query + row;
                                            if (query < block.length)
                                              p.delta[block.statistics(p) + query] = delta;
                                          });
  __syncthreads();

  // A warp without queries copies its share and keeps the barriers, nothing else.
  const int warp_row = warp * Tile::kWarpQueries;
  const bool has_queries = first_query + warp_row < block.length;
  const Address queries_by_rows = Address::by_rows(shared + warp_row * kHeadDim * 2);
  float shift[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * i + 8 * r + g;
      delta[i][r] = deltas[row];
      // Queries past the end, whose dQ is not stored, need some finite number.
      const int query = first_query + row;
      shift[i][r] = query < block.length ? p.lse[block.statistics(p) + query] * kLog2E : 0.0f;
    }
  }

  float dq[kRowTiles][kHeadDim / 8][4] = {};
  const int tiles = (block.length + Tile::kKeys - 1) / Tile::kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here for every thread, and the other stage is no longer read
    if (tile + 1 < tiles) copy_keys(tile + 1);
    cp_async_commit();
    if (!has_queries) continue;

    const uint32_t stage = shared + Tile::kStages + (tile & 1) * 2 * Tile::kKeyBytes;
#pragma unroll 1  // unrolled, two parts' scores would be alive at once
    for (int part = 0; part < Tile::kKeys; part += Tile::kKeysAtOnce) {
      const int first_key = tile * Tile::kKeys + part;
      const uint32_t keys = stage + part * kHeadDim * 2;
      const Address by_rows = Address::by_rows(keys), by_columns = Address::by_columns(keys);
      // P = exp(scale Q Kᵀ − lse)
      float scores[kRowTiles][kColTiles][4] = {};
      multiply_rows(scores, queries_by_rows, by_columns);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            scores[i][j][c] = exp2_approx(scores[i][j][c] * scale_log2 - shift[i][c / 2]);
          }
        }
      }
      if (block.length - first_key < Tile::kKeysAtOnce) {
        // Keys past the end have score 0, whose exp may overflow and would reach dQ as NaN.
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first_key + 16 * (j / 2) + 4 * t + 2 * (j % 2) + e;
            if (key >= block.length) {
#pragma unroll
              for (int i = 0; i < kRowTiles; ++i) {
                scores[i][j][e] = 0.0f;
                scores[i][j][2 + e] = 0.0f;
              }
            }
          }
        }
      }

      // dS = P (dropout'(dO Vᵀ) − delta), dQ += dS K
      float ds[kRowTiles][kColTiles][4] = {};
      multiply_rows(ds, queries_by_rows + Tile::kQueryBytes, by_columns + Tile::kKeyBytes);
#pragma unroll
      for (int m = 0; m < Tile::kKeysAtOnce / 16; ++m) {
        uint32_t left[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          if (p.dropout.active) {  // a branch that the whole grid takes alike
            const int token = block.start + first_query + warp_row + 16 * i + g;
            drop_probabilities(ds[i][2 * m], ds[i][2 * m + 1], philox, p.dropout.threshold,
                               first_key / 4 + 4 * m + t, token, block.head);
          }
#pragma unroll
          for (int j = 2 * m; j < 2 * m + 2; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              ds[i][j][c] = scores[i][j][c] * (ds[i][j][c] * p.dropout.scale - delta[i][c / 2]);
            }
          }
          as_left_operand<T>(left[i], ds[i][2 * m], ds[i][2 * m + 1]);
        }
        multiply_by_rows(dq, left, by_rows.rows(16 * m));
      }
    }
  }
  if (!has_queries) return;
  store_rows<T, kHeadDim>(dq, p.softmax_scale, memory, warp_row, block.gradient<T>(p, 0), stride,
                          block.length, [&](int row) { return first_query + warp_row + row; });
}

}  // namespace fastbert::cuda
