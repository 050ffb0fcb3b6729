// Attention backward by key tiles, on tensor cores (mma.sync, sm_80 and later) in bf16 and fp16: a
// block holds a tile of keys and values and walks over the queries (Dao 2023, algorithm 2). Scores
// are computed transposed, (keys, queries): rounded, they are in registers the left operands of
// dV += Pᵀ dO and dK += dSᵀ Q, whose sums stay in registers too.
//
// With kWholeSequence one block walks over all key tiles of a (sequence, head) and sums dQ on the
// chip, in fp32 shared memory, each element in one thread and in the order of the key tiles: no
// atomics, the same inputs give the same bits, and each score is computed once. Otherwise a block
// has one key tile, and attention_bwd_queries.cuh has computed dQ.
#pragma once

#include "attention_bwd.cuh"

namespace fastbert::cuda {

/// Sizes of a block's work, and where things lie in shared memory.
template <typename T, int kHeadDim, int kWarps_>
struct KeyTile {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * kWarpSize;
  // dK and dV of 32 keys a warp are 128 registers at 64 dimensions; at 128 there is room for 16.
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kBlocksPerSM = 8 / kWarps;  // a bound on registers, 255
  static constexpr int kWarpKeys = 16 * kRowTiles;
  static constexpr int kLaneKeys = 2 * kRowTiles;  // rows of MMA tiles that a lane has a part of
  static constexpr int kKeys = kWarps * kWarpKeys;
  static constexpr int kQueries = 32;  // a step
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kStatisticBytes = kQueries * 4;

  // Keys and values; two stages of queries and dout; two of lse and of delta, or, for the whole
  // sequence, two of lse alone, dSᵀ, delta of all queries and the sums of dQ.
  static constexpr int kStages = 2 * kKeyBytes;
  static constexpr int kLse = kStages + 4 * kQueryBytes;
  static constexpr int kStagedDelta = kLse + 2 * kStatisticBytes;
  static constexpr int kTileBytes = kStagedDelta + 2 * kStatisticBytes;
  static constexpr int kScores = kLse + 2 * kStatisticBytes;
  static constexpr int kDelta = kScores + kKeys * kQueries * 2;

  /// Queries of a sequence, padded to whole steps.
  __host__ __device__ static constexpr int padded(int length) {
    return (length + kQueries - 1) / kQueries * kQueries;
  }
  /// Where dQ begins. One key tile completes the dQ of a step, which need not stay then.
  __host__ __device__ static constexpr int query_gradients(int length) {
    return kDelta + 4 * padded(length);
  }
  __host__ __device__ static constexpr int whole_sequence_bytes(int length) {
    const int rows = length <= kKeys ? kQueries : padded(length);
    return query_gradients(length) + rows * kHeadDim * 4;
  }

  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return AttentionTile<T, kHeadDim>::offset(row, chunk);
  }
  /// Of dSᵀ (keys, kQueries), whose rows are as long as those of 32 dimensions.
  __device__ __forceinline__ static uint32_t score_offset(int row, int chunk) {
    return AttentionTile<T, kQueries>::offset(row, chunk);
  }
  /// Index of element (row, 8 chunk) of the sums of dQ: the rotation puts the four rows that half a
  /// warp writes at once in different banks.
  __device__ __forceinline__ static int sum_index(int row, int chunk) {
    return row * kHeadDim + ((chunk ^ (row & 3)) << 3);
  }

  /// The shared row of a key. A lane has rows g, g + 8, … of its warp's MMA tiles: in this order
  /// they are consecutive keys, whose dropout words are one Philox block or half of one.
  __device__ __forceinline__ static int key_row(int key) {
    const int local = key % kWarpKeys;
    return key - local + local % kLaneKeys * 8 + local / kLaneKeys;
  }
  /// The other way, among the keys of a warp.
  __device__ __forceinline__ static int row_key(int row) { return row % 8 * kLaneKeys + row / 8; }
};

/// Negates a lane's dropped probabilities: in the sign the mask takes no registers while dP is
/// computed. p[i][j][2 r + e] is of key `first_key` + 2 i + r, of this lane, and of query `token` +
/// 8 j + e.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void mark_dropped(float (&p)[kRowTiles][kColTiles][4],
                                             const Philox& philox, uint32_t threshold,
                                             uint32_t first_key, uint32_t token, uint32_t head) {
  const auto mark = [&](float& value, uint32_t word) {
    if (word < threshold) value = -value;
  };
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
    if constexpr (kRowTiles == 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint4 words = philox.words(first_key / 4, token + 8 * j + e, head);
        mark(p[0][j][e], words.x);
        mark(p[0][j][2 + e], words.y);
        mark(p[1][j][e], words.z);
        mark(p[1][j][2 + e], words.w);
      }
    } else {
      // Two keys a lane: the lane above or below has the other two of the Philox block. Each draws
      // for one of two queries and hands over what is the other's.
      const bool odd = first_key & 2;
      const uint4 words = philox.words(first_key / 4, token + 8 * j + odd, head);
      const uint32_t first = __shfl_xor_sync(kFullWarp, odd ? words.x : words.z, 4);
      const uint32_t second = __shfl_xor_sync(kFullWarp, odd ? words.y : words.w, 4);
      mark(p[0][j][0], odd ? first : words.x);
      mark(p[0][j][2], odd ? second : words.y);
      mark(p[0][j][1], odd ? words.z : first);
      mark(p[0][j][3], odd ? words.w : second);
    }
  }
}

/// The place of a thread in its block and in MMA tiles. Made anew in each part of the kernel, it
/// takes no registers in the others.
struct Place {
  int thread, warp, lane;
  int g, t;  // row and column

  __device__ __forceinline__ Place()
      : thread(reread_thread_index()),
        warp(thread / kWarpSize),
        lane(thread % kWarpSize),
        g(lane / 4),
        t(lane % 4) {}
};

template <typename T, int kHeadDim, int kWarps, bool kWholeSequence>
__global__ void __launch_bounds__(KeyTile<T, kHeadDim, kWarps>::kThreads,
                                  KeyTile<T, kHeadDim, kWarps>::kBlocksPerSM)
    attention_bwd_keys_kernel(const AttentionBackward p) {
  using Tile = KeyTile<T, kHeadDim, kWarps>;
  constexpr int kRowTiles = Tile::kRowTiles, kQueries = Tile::kQueries;
  using Address = LaneAddress<T, kHeadDim>;
  constexpr int kPart = 16;  // queries at once: one step of the products that sum over queries
  const AttentionBackwardBlock block(p);
  int first_key = block.tile * Tile::kKeys;
  if (first_key >= block.length) return;

  const int64_t stride = AttentionBlock::row_stride(p);
  unsigned char* memory = dynamic_shared_memory();
  const uint32_t shared = shared_address(memory);
  const float scale_log2 = p.softmax_scale * kLog2E;
  const int steps = Tile::padded(block.length) / kQueries;

  const auto copy_keys = [&] {
    const auto to_row = [](int key) { return Tile::key_row(key); };
    const T* keys = block.input<T>(p, 1) + first_key * stride;
    const int valid = block.length - first_key;
    const int thread = reread_thread_index();
    copy_rows<Tile, Tile::kKeys>(shared, keys, stride, valid, to_row, thread);
    copy_rows<Tile, Tile::kKeys>(shared + Tile::kKeyBytes, keys + p.heads * kHeadDim, stride, valid,
                                 to_row, thread);
  };
  // Queries past the end become zeros, lse and delta too: their probabilities are 1, and what those
  // multiply is 0.
  const auto copy_queries = [&](int step) {
    const auto to_row = [](int row) { return row; };
    const int first = step * kQueries, stage = step & 1;
    const int64_t out_stride = AttentionBackwardBlock::out_stride(p);
    const int thread = reread_thread_index();
    const uint32_t queries = shared + Tile::kStages + stage * 2 * Tile::kQueryBytes;
    copy_rows<Tile, kQueries>(queries, block.input<T>(p, 0) + first * stride, stride,
                              block.length - first, to_row, thread);
    copy_rows<Tile, kQueries>(queries + Tile::kQueryBytes,
                              block.output<T>(p, p.dout) + first * out_stride, out_stride,
                              block.length - first, to_row, thread);
    if (thread < kQueries) {
      const int query = first + thread;
      const bool valid = query < block.length;
      const int64_t at = block.statistics(p) + (valid ? query : 0);
      const uint32_t to = shared + stage * Tile::kStatisticBytes + 4 * thread;
      cp_async4(to + Tile::kLse, p.lse + at, valid);
      if constexpr (!kWholeSequence) cp_async4(to + Tile::kStagedDelta, p.delta + at, valid);
    }
  };

  float* const deltas = reinterpret_cast<float*>(memory + Tile::kDelta);
  float* const dq = reinterpret_cast<float*>(memory + Tile::query_gradients(block.length));
  const bool keeps_dq = block.length > Tile::kKeys;
  // Stores the dQ of a step, complete and visible, 16 bytes a thread.
  const auto store_dq = [&](int step) {
    const float* from = dq + (keeps_dq ? step * kQueries * kHeadDim : 0);
#pragma unroll
    for (int i = reread_thread_index(); i < kQueries * Tile::kChunks; i += Tile::kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const int query = step * kQueries + row;
      if (query >= block.length) continue;
      float values[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four =
            *reinterpret_cast<const float4*>(from + Tile::sum_index(row, chunk) + 4 * half);
        values[4 * half] = four.x * p.softmax_scale;
        values[4 * half + 1] = four.y * p.softmax_scale;
        values[4 * half + 2] = four.z * p.softmax_scale;
        values[4 * half + 3] = four.w * p.softmax_scale;
      }
      store(block.gradient<T>(p, 0) + query * stride + chunk * 8, values);
    }
  };

  for (;;) {  // over key tiles
    copy_keys();
    copy_queries(0);
    cp_async_commit();
    const bool is_first = first_key == 0;
    const bool is_last = first_key + Tile::kKeys >= block.length;
    if (kWholeSequence && is_first) {
      row_deltas<T, kHeadDim, Tile::kThreads>(p, block, 0, steps * kQueries,
                                              [&](int row, float delta) { deltas[row] = delta; });
    }

    // Warps that have keys; the others do their share of the rest.
    const int warps =
        min(kWarps, (block.length - first_key + Tile::kWarpKeys - 1) / Tile::kWarpKeys);
    uint32_t values[kHeadDim / 16][kRowTiles][4];  // the warp's, left operands of every step
    float dk[kRowTiles][kHeadDim / 8][4] = {}, dv[kRowTiles][kHeadDim / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      // This step's rows are here for every thread; the other stage, dSᵀ and, of one key tile, dQ
      // of the former step are complete.
      __syncthreads();
      if (step + 1 < steps) copy_queries(step + 1);
      cp_async_commit();
      if (kWholeSequence && is_last && step > 0) store_dq(step - 1);

      const int stage = step & 1;
      const uint32_t queries = shared + Tile::kStages + stage * 2 * Tile::kQueryBytes;
      const float* lse = reinterpret_cast<const float*>(memory + Tile::kLse) + stage * kQueries;
      const float* delta =
          kWholeSequence
              ? deltas + step * kQueries
              : reinterpret_cast<const float*>(memory + Tile::kStagedDelta) + stage * kQueries;
      if (const Place at; at.warp < warps) {
        const int warp_row = at.warp * Tile::kWarpKeys;
        const int lane_key = first_key + warp_row + at.g * Tile::kLaneKeys;
        const Address keys = Address::by_rows(shared + warp_row * kHeadDim * 2);
        if (step == 0) {
#pragma unroll
          for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              ldmatrix_x4(values[d][i], (keys + Tile::kKeyBytes).rows(16 * i).dims(d));
            }
          }
        }
#pragma unroll 1  // unrolled, two parts' scores would be alive at once
        for (int part = 0; part < kQueries; part += kPart) {
          // Of the queries; dout is kQueryBytes further.
          const Address by_rows = Address::by_rows(queries + part * kHeadDim * 2);
          const Address by_columns = Address::by_columns(queries + part * kHeadDim * 2);
          // P = exp(scale K Qᵀ − lse)
          float scores[kRowTiles][2][4] = {};
          multiply_rows(scores, keys, by_columns);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float shift = lse[part + 8 * j + 2 * at.t + e] * kLog2E;
#pragma unroll
              for (int q = 0; q < Tile::kLaneKeys; ++q) {
                float& score = scores[q / 2][j][q % 2 * 2 + e];
                score = exp2_approx(score * scale_log2 - shift);
              }
            }
          }
          if (is_last) {
            // Keys past the end have score 0, whose exp may overflow and would reach dQ as NaN.
#pragma unroll
            for (int q = 0; q < Tile::kLaneKeys; ++q) {
              if (lane_key + q >= block.length) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  scores[q / 2][j][q % 2 * 2] = 0.0f;
                  scores[q / 2][j][q % 2 * 2 + 1] = 0.0f;
                }
              }
            }
          }
          if (p.dropout.active) {  // a branch that the whole grid takes alike
            // The seed is read each time: kept, its ten keys would be registers.
            mark_dropped(scores, Philox(p.dropout), p.dropout.threshold, lane_key,
                         block.start + step * kQueries + part + 2 * at.t, block.head);
          }

          // dV += dropout(P) dO, without the factor 1 / (1 − p)
          uint32_t left[kRowTiles][4];
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            float kept[2][4];
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const float probability = scores[i][c / 4][c % 4];
              kept[c / 4][c % 4] = probability < 0.0f ? 0.0f : probability;
            }
            as_left_operand<T>(left[i], kept[0], kept[1]);
          }
          multiply_by_rows(dv, left, by_rows + Tile::kQueryBytes);

          // dS = P (dropout'(V dOᵀ) − delta)
          float ds[kRowTiles][2][4] = {};
#pragma unroll
          for (int d = 0; d < kHeadDim / 16; ++d) {
            multiply_dims(ds, values[d], by_columns + Tile::kQueryBytes, d);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float query_delta = delta[part + 8 * j + 2 * at.t + e];
#pragma unroll
              for (int q = 0; q < Tile::kLaneKeys; ++q) {
                const float probability = scores[q / 2][j][q % 2 * 2 + e];
                float& dp = ds[q / 2][j][q % 2 * 2 + e];
                const float kept = probability < 0.0f ? 0.0f : dp * p.dropout.scale;
                dp = fabsf(probability) * (kept - query_delta);
              }
            }
          }

          // dK += dS Q; dS goes to the other warps as well, for dQ.
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            as_left_operand<T>(left[i], ds[i][0], ds[i][1]);
            if constexpr (kWholeSequence) {
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                const int row = warp_row + 16 * i + c % 2 * 8 + at.g;
                *reinterpret_cast<uint32_t*>(memory + Tile::kScores +
                                             Tile::score_offset(row, part / 8 + c / 2) + 4 * at.t) =
                    left[i][c];
              }
            }
          }
          multiply_by_rows(dk, left, by_rows);
        }
      }

      if constexpr (kWholeSequence) {
        // dQ += dSᵀ K: a warp has 16 queries of the step and a part of the dimensions.
        __syncthreads();  // dS of all warps
        const Place at;
        constexpr int kDims = kHeadDim / (kWarps / 2);
        const int first_query = at.warp % 2 * 16, first_chunk = at.warp / 2 * (kDims / 8);
        float sums[kDims / 8][4] = {};
#pragma unroll 4
        for (int group = 0; group < kRowTiles * warps; ++group) {
          uint32_t left[4];
          ldmatrix_x4_transposed(left,
                                 shared + Tile::kScores +
                                     Tile::score_offset(16 * group + at.lane % 8 + at.lane / 16 * 8,
                                                        first_query / 8 + at.lane / 8 % 2));
#pragma unroll
          for (int d = 0; d < kDims / 16; ++d) {
            uint32_t right[4];
            ldmatrix_x4_transposed(right,
                                   shared + Tile::offset(16 * group + at.lane % 16,
                                                         first_chunk + 2 * d + at.lane / 16));
            mma_m16n8k16<T>(sums[2 * d], left, right[0], right[1]);
            mma_m16n8k16<T>(sums[2 * d + 1], left, right[2], right[3]);
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = (keeps_dq ? step * kQueries : 0) + first_query + 8 * r + at.g;
#pragma unroll
          for (int j = 0; j < kDims / 8; ++j) {
            float2* to =
                reinterpret_cast<float2*>(dq + Tile::sum_index(row, first_chunk + j) + 2 * at.t);
            const float2 former = is_first ? make_float2(0.0f, 0.0f) : *to;
            *to = make_float2(former.x + sums[j][2 * r], former.y + sums[j][2 * r + 1]);
          }
        }
      }
    }

    if (const Place at; at.warp < warps) {  // through this warp's values, which no other reads
      const int warp_row = at.warp * Tile::kWarpKeys;
      const auto position = [&](int row) { return first_key + warp_row + Tile::row_key(row); };
      store_rows<T, kHeadDim>(dv, p.dropout.scale, memory + Tile::kKeyBytes, warp_row,
                              block.gradient<T>(p, 2), stride, block.length, position);
      store_rows<T, kHeadDim>(dk, p.softmax_scale, memory + Tile::kKeyBytes, warp_row,
                              block.gradient<T>(p, 1), stride, block.length, position);
    }
    if constexpr (!kWholeSequence) return;
    __syncthreads();  // keys and values are no longer read, dQ of the last step is complete
    if (is_last) {
      store_dq(steps - 1);
      return;
    }
    first_key += Tile::kKeys;
  }
}

}  // namespace fastbert::cuda
