// Attention forward for Hopper (wgmma, sm_90a) in bf16 and fp16, head dimensions 64 and 128, after
// FlashAttention-3 (Shah et al. 2024, section 3.2): the products of the next scores and of P V go to
// the tensor cores together, and the softmax of the next scores runs beside P V.
//
// Counted for 64 dimensions, a warpgroup's 64 queries and a tile of 64 keys, per SM:
//   MMA     8 wgmma of 64 × 64 × 16 at 2048 multiply-adds a cycle            256 cycles
//   exp     64 × 64 at 16 a cycle                                            256
//   shared  Q, K and V read, half of K and V written: 32 KB at 128 B         256
//   issue   301 instructions a warp, 678 with dropout, one a scheduler       301, 678
// 350 TFLOP/s are 724 cycles a tile, at the 1.83 GHz of the datasheet's 989. In one warpgroup these
// come mostly one after another, so that an SM needs several: two blocks of two, with 115 registers
// a thread (128 with dropout, all there are) and 64 KB of shared memory a block. Blocks of 128
// queries read 1/128 byte of keys and values a FLOP, 2.7 TB/s from L2 at that rate.
//
// For 128 dimensions and tiles of 128 keys, MMA 1024 cycles, exp 512, shared 1024: one block, with 212
// registers (254) and 224 KB.
#pragma once

#include "attention_tile.cuh"
#include "wgmma.cuh"

namespace fastbert::cuda {

/// Sizes of a block's work, and where its rows lie in shared memory.
template <typename T, int kHeadDim>
struct AttentionWgmmaTile {
  static_assert(sizeof(T) == 2 && (kHeadDim == 64 || kHeadDim == 128));
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = kWarpgroups * kWarpgroupSize;
  static constexpr int kBlocksPerSM = kHeadDim == 64 ? 2 : 1;
  static constexpr int kQueries = kWarpgroups * 64;
  static constexpr int kKeys = kHeadDim == 64 ? 64 : 128;
  static constexpr int kStages = 3;  // one multiplied with queries, one with P, one on its way
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  // Queries (later the output), then the stages of keys and values.
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes;

  /// Bytes from the first 64 dimensions of all rows to the next 64: wgmma's lines hold no more.
  static constexpr int kHalfBytes = kKeys * kSwizzleLineBytes;
  static_assert(kHeadDim == 64 || kQueries == kKeys);

  /// Byte offset of a chunk.
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return chunk / 8 * kHalfBytes + swizzled_offset(row, chunk % 8);
  }
};

template <typename T, int kHeadDim, bool kDropout>
__global__ void __launch_bounds__(AttentionWgmmaTile<T, kHeadDim>::kThreads,
                                  AttentionWgmmaTile<T, kHeadDim>::kBlocksPerSM)
    attention_fwd_wgmma_kernel(const AttentionForward p) {
#ifdef FASTBERT_WGMMA_CODE
  using Tile = AttentionWgmmaTile<T, kHeadDim>;
  const AttentionBlock block(p);
  const int first_query = block.tile * Tile::kQueries;
  if (first_query >= block.length) return;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t stride = AttentionBlock::row_stride(p);
  unsigned char* memory = dynamic_shared_memory();
  const uint32_t query_shared = shared_address(memory);
  const uint32_t key_shared = query_shared + Tile::kQueryBytes;

  // A thread copies its chunk of every 16th or 32nd row: in steps of 8 rows nothing else changes in
  // the place of a chunk, in steps of 16 nothing in that of a key.
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kChunks;
  static_assert(kRowsAtOnce % 16 == 0);
  const int copied_row = threadIdx.x / Tile::kChunks, copied_chunk = threadIdx.x % Tile::kChunks;
  const uint32_t copied_to = key_shared + Tile::offset(key_row(copied_row), copied_chunk);
  const T* copied_from = block.input<T>(p, 1) + copied_row * stride + copied_chunk * 8;
  const auto copy_keys = [&](int first, uint32_t stage) {  // called with one tile after another
    if (first < block.length) {
#pragma unroll
      for (int i = 0; i < Tile::kKeys; i += kRowsAtOnce) {
        const bool is_valid = first + copied_row + i < block.length;
        const uint32_t to = copied_to + stage + i * kSwizzleLineBytes;
        const T* from = copied_from + i * stride;
        cp_async16(to, from, is_valid);
        cp_async16(to + Tile::kKeyBytes, from + p.heads * kHeadDim, is_valid);  // the values
      }
      copied_from += Tile::kKeys * stride;
    }
    cp_async_commit();
  };
  copy_rows<Tile, Tile::kQueries>(query_shared, block.input<T>(p, 0) + first_query * stride, stride,
                                  block.length - first_query, [](int row) { return row; });
  copy_keys(0, 0);
  copy_keys(Tile::kKeys, Tile::kStageBytes);
  cp_async_wait<1>();
  fence_async_proxy();
  __syncthreads();

  uint32_t stage = 0;
  const auto next = [](uint32_t offset) {
    return offset == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : offset + Tile::kStageBytes;
  };
  // To the tile of keys from `first` on: it is here for every thread, and the one before the last,
  // whose place the one after it takes, is no longer read.
  const auto advance = [&](int first) {
    cp_async_wait<0>();
    fence_async_proxy();
    __syncthreads();
    stage = next(stage);
    copy_keys(first + Tile::kKeys, next(stage));
  };
  // A warpgroup without queries copies its share and keeps the barriers, nothing else.
  if (first_query + warp / 4 * 64 >= block.length) {
#pragma unroll 1
    for (int first = Tile::kKeys; first < block.length; first += Tile::kKeys) advance(first);
    __syncthreads();
    return;
  }

  const int warp_row = 16 * warp;
  const float scale_log2 = p.softmax_scale * kLog2E;

  uint32_t probabilities[Tile::kKeys / 16][4];
  float scores[Tile::kKeys / 8][4];
  float out[kHeadDim / 8][4] = {};
  SoftmaxRows rows;
  float factors[2];
  const uint64_t queries = swizzled_matrix(query_shared + warp / 4 * 64 * kSwizzleLineBytes);
  const uint64_t matrices = swizzled_matrix(key_shared);
  // S = Q Kᵀ
  const auto multiply_queries = [&](uint32_t stage) {
    const uint64_t keys = matrix_at(matrices, stage);
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 64; ++n) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const uint32_t dims = k / 4 * Tile::kHalfBytes + k % 4 * 32;
        wgmma_shared_a<T>(scores + 8 * n, matrix_at(queries, dims),
                          matrix_at(keys, 64 * n * kSwizzleLineBytes + dims), k > 0);
      }
    }
    wgmma_commit();
  };
  // O += P V
  const auto multiply_probabilities = [&](uint32_t stage) {
    const uint64_t values = matrix_at(matrices, stage + Tile::kKeyBytes);
#pragma unroll
    for (int n = 0; n < kHeadDim / 64; ++n) {
#pragma unroll
      for (int k = 0; k < Tile::kKeys / 16; ++k) {
        wgmma_register_a<T>(out + 8 * n, probabilities[k],
                            matrix_at(values, n * Tile::kHalfBytes + 16 * k * kSwizzleLineBytes));
      }
    }
    wgmma_commit();
  };
  const auto softmax = [&](int first) {
    const int valid = block.length - first;
    if (valid < Tile::kKeys) mask_ragged_end(scores, valid, lane % 4);
    raise_maxima(scores, rows, factors, scale_log2);
    exponentiate(scores, rows, scale_log2);
    if constexpr (kDropout) {
      const Philox philox(p.dropout);  // here, that its keys take no registers elsewhere
      const int token = block.start + first_query + warp_row + lane / 4;
#pragma unroll
      for (int m = 0; m < Tile::kKeys / 16; ++m) {
        drop_probabilities(scores[2 * m], scores[2 * m + 1], philox, p.dropout.threshold,
                           first / 4 + 4 * m + lane % 4, token, block.head);
      }
    }
  };
  // What waits for P V. It stands a branch away from the softmax that goes beside P V: in one block
  // of code the compiler takes the wait first.
  const auto round_probabilities = [&] {
    wgmma_wait<0>(out);
    rescale_rows(out, factors);
#pragma unroll
    for (int m = 0; m < Tile::kKeys / 16; ++m) {
      as_left_operand<T>(probabilities[m], scores[2 * m], scores[2 * m + 1]);
    }
  };

  wgmma_fence(scores);
  multiply_queries(stage);
  wgmma_wait<0>(scores);
  softmax(0);
  for (int first = Tile::kKeys; first < block.length; first += Tile::kKeys) {
    round_probabilities();
    const uint32_t last = stage;
    advance(first);
    wgmma_fence(probabilities, scores, out);
    multiply_queries(stage);
    multiply_probabilities(last);
    wgmma_wait<1>(scores);
    softmax(first);
  }
  round_probabilities();
  __syncthreads();  // no warp multiplies queries any more, whose memory takes the output
  wgmma_fence(probabilities, out);
  multiply_probabilities(stage);
  wgmma_wait<0>(out);

  // Through this warp's own rows of the query memory.
  const int valid_queries = block.length - first_query;
  finish_rows<Tile, T>(memory, out, rows, warp_row, valid_queries, p.softmax_scale, p.dropout.scale,
                       block.lse(p, first_query));
  store_rows<Tile, 16>(memory, block.output<T>(p, first_query), AttentionBlock::output_stride(p),
                       warp_row, valid_queries);
#else
  __trap();  // attention_fwd() launches it where it has code
#endif
}

}  // namespace fastbert::cuda
