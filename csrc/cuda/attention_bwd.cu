// Attention backward over packed sequences: which kernels, and how they are launched.
#include <algorithm>
#include <type_traits>

#include "attention_bwd_any.cuh"
#include "attention_bwd_keys.cuh"
#include "attention_bwd_queries.cuh"

namespace fastbert::cuda {
namespace {

constexpr const char* kOp = "attention_bwd";

/// A call's sizes that kernels do not need.
struct Launch {
  int64_t batch, max_seqlen;
  cudaStream_t stream;

  unsigned grid(const AttentionBackward& p) const {
    return grid_extent(batch * p.heads * p.tiles, kOp);
  }
  int tiles(int64_t size) const { return static_cast<int>(ceil_div(max_seqlen, size)); }
};

/// The most shared memory that a block can have on the current device.
int shared_bytes_of_device() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  return bytes;
}

// Counted for 64 dimensions and 8192 scores (128 queries, 64 keys):
//
//                products  MMAs      exps  Philox blocks  shared memory  DRAM
//   one block           5  1280  1 × 8192           2048         352 KB    16
//   two kernels         7  1792  2 × 8192           4096         352 KB    24
//
// MMAs: of 16 × 8 × 16. Philox blocks: of dropout. Shared memory: read and written by warps; one
// block spends 160 KB of it on dS and the sums of dQ, two kernels load K and V twice. DRAM:
// bytes a token, head and channel. One block is never worse, but for one thing: it is as long as
// its sequence, and there are only batch · heads of them.

/// True where one block can take a whole (sequence, head) and is not too long for the others.
template <typename Tile>
bool fits_one_block(int64_t max_seqlen) {
  constexpr int64_t kLongest = 512;
  return max_seqlen <= kLongest &&
         Tile::whole_sequence_bytes(static_cast<int>(max_seqlen)) <= shared_bytes_of_device();
}

template <typename T, int kHeadDim, int kWarps>
void launch_whole_sequences(AttentionBackward p, const Launch& call) {
  using Tile = KeyTile<T, kHeadDim, kWarps>;
  p.tiles = 1;
  launch(kOp, attention_bwd_keys_kernel<T, kHeadDim, kWarps, true>, call.grid(p), Tile::kThreads,
         Tile::whole_sequence_bytes(static_cast<int>(call.max_seqlen)), call.stream, p);
}

template <typename T, int kHeadDim>
void launch_two_kernels(AttentionBackward p, const Launch& call) {
  using Queries = QueryTile<T, kHeadDim>;
  using Keys = KeyTile<T, kHeadDim, kHeadDim <= 64 ? 4 : 8>;
  p.tiles = call.tiles(Queries::kQueries);
  launch(kOp, attention_bwd_queries_kernel<T, kHeadDim>, call.grid(p), Queries::kThreads,
         Queries::kSharedBytes, call.stream, p);
  p.tiles = call.tiles(Keys::kKeys);
  launch(kOp, attention_bwd_keys_kernel<T, kHeadDim, Keys::kWarps, false>, call.grid(p),
         Keys::kThreads, Keys::kTileBytes, call.stream, p);
}

template <typename T, int kHeadDim>
void launch_mma(const AttentionBackward& p, const Launch& call) {
  // Eight warps fill an SM's registers, in one block or two. A warp's keys are 32, or 16 at 128
  // dimensions; a block has 128, at 64 dimensions 256 where the sequences are longer.
  using Short = KeyTile<T, kHeadDim, kHeadDim <= 64 ? 4 : 8>;
  using Long = KeyTile<T, kHeadDim, kHeadDim == 32 ? 4 : 8>;
  const bool is_short = call.max_seqlen <= Short::kKeys;
  if (is_short && fits_one_block<Short>(call.max_seqlen)) {
    return launch_whole_sequences<T, kHeadDim, Short::kWarps>(p, call);
  }
  if (!is_short && fits_one_block<Long>(call.max_seqlen)) {
    return launch_whole_sequences<T, kHeadDim, Long::kWarps>(p, call);
  }
  launch_two_kernels<T, kHeadDim>(p, call);
}

/// False when no such kernel is compiled for the head dimension.
template <typename T>
bool try_launch_mma(const AttentionBackward& p, const Launch& call) {
  switch (p.head_dim) {
    case 32:
      launch_mma<T, 32>(p, call);
      return true;
    case 64:
      launch_mma<T, 64>(p, call);
      return true;
    case 128:
      launch_mma<T, 128>(p, call);
      return true;
    default:
      return false;
  }
}

template <typename T>
void launch_any(AttentionBackward p, const Launch& call) {
  // A warp a row: as many as fit the shared memory that every GPU gives without asking.
  const int64_t warp_bytes = attention_bwd_any_warp_bytes(p.head_dim);
  const int64_t warps = std::min<int64_t>(8, 48 * 1024 / warp_bytes);
  if (warps == 0) {
    throw std::invalid_argument(std::string(kOp) + ": head dimension " +
                                std::to_string(p.head_dim) + " is too large");
  }
  p.tiles = call.tiles(warps);
  const dim3 block(kWarpSize, static_cast<unsigned>(warps));
  const int64_t shared_bytes = warps * warp_bytes;
  launch(kOp, attention_bwd_any_queries_kernel<T>, call.grid(p), block, shared_bytes, call.stream,
         p);
  launch(kOp, attention_bwd_any_keys_kernel<T>, call.grid(p), block, shared_bytes, call.stream, p);
}

}  // namespace

void attention_bwd(const void* dout, const void* qkv, const void* out, const float* lse,
                   const int32_t* cu_seqlens, void* dqkv, float* delta, int64_t tokens,
                   int64_t batch, int64_t heads, int64_t head_dim, int64_t max_seqlen,
                   double softmax_scale, double dropout_p, const int64_t* dropout_seed,
                   int64_t dropout_offset, int dtype, cudaStream_t stream) {
  const AttentionBackward p{dout,
                            qkv,
                            out,
                            lse,
                            cu_seqlens,
                            dqkv,
                            delta,
                            tokens,
                            static_cast<int>(heads),
                            static_cast<int>(head_dim),
                            /*tiles=*/0,
                            static_cast<float>(softmax_scale),
                            make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (tokens == 0 || heads == 0 || head_dim == 0 || max_seqlen == 0) return;
  const Launch call{batch, max_seqlen, stream};
  with_type(dtype, kOp, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (aligned16(dout, qkv, out, dqkv) && try_launch_mma<T>(p, call)) return;
    }
    launch_any<T>(p, call);
  });
}

}  // namespace fastbert::cuda
