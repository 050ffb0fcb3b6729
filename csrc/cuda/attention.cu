// Attention forward over packed sequences: which kernel, and how it is launched.
#include <algorithm>
#include <type_traits>

#include "attention_any.cuh"
#include "attention_mma.cuh"

namespace fastbert::cuda {
namespace {

constexpr const char* kOp = "attention_fwd";

template <typename T, int kHeadDim, bool kDropout>
void launch_mma(AttentionForward p, int64_t batch, int64_t max_seqlen, cudaStream_t stream) {
  using Tile = AttentionTile<T, kHeadDim>;
  p.query_tiles = static_cast<int>(ceil_div<int64_t>(max_seqlen, Tile::kQueries));
  launch(kOp, attention_fwd_mma_kernel<T, kHeadDim, kDropout>,
         grid_extent(batch * p.heads * p.query_tiles, kOp), Tile::kThreads, Tile::kSharedBytes,
         stream, p);
}

/// False when no such kernel is compiled for the head dimension.
template <typename T>
bool try_launch_mma(const AttentionForward& p, int64_t batch, int64_t max_seqlen,
                    cudaStream_t stream) {
  const auto with_dropout = [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (p.dropout.active) {
      launch_mma<T, kHeadDim, true>(p, batch, max_seqlen, stream);
    } else {
      launch_mma<T, kHeadDim, false>(p, batch, max_seqlen, stream);
    }
    return true;
  };
  switch (p.head_dim) {
    case 32:
      return with_dropout(std::integral_constant<int, 32>{});
    case 64:
      return with_dropout(std::integral_constant<int, 64>{});
    case 128:
      return with_dropout(std::integral_constant<int, 128>{});
    default:
      return false;
  }
}

template <typename T>
void launch_any(AttentionForward p, int64_t batch, int64_t max_seqlen, cudaStream_t stream) {
  // A warp a query: as many as fit the shared memory that every GPU gives without asking.
  const int64_t warp_bytes = attention_any_warp_bytes(p.head_dim);
  const int64_t warps = std::min<int64_t>(8, 48 * 1024 / warp_bytes);
  if (warps == 0) {
    throw std::invalid_argument(std::string(kOp) + ": head dimension " +
                                std::to_string(p.head_dim) + " is too large");
  }
  p.query_tiles = static_cast<int>(ceil_div<int64_t>(max_seqlen, warps));
  launch(kOp, attention_fwd_any_kernel<T>, grid_extent(batch * p.heads * p.query_tiles, kOp),
         dim3(kWarpSize, static_cast<unsigned>(warps)), warps * warp_bytes, stream, p);
}

}  // namespace

void attention_fwd(const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t tokens, int64_t batch, int64_t heads, int64_t head_dim,
                   int64_t max_seqlen, double softmax_scale, double dropout_p,
                   const int64_t* dropout_seed, int64_t dropout_offset, int dtype,
                   cudaStream_t stream) {
  const AttentionForward p{qkv,
                           cu_seqlens,
                           out,
                           lse,
                           tokens,
                           static_cast<int>(heads),
                           static_cast<int>(head_dim),
                           /*query_tiles=*/0,
                           static_cast<float>(softmax_scale),
                           make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (tokens == 0 || heads == 0 || head_dim == 0 || max_seqlen == 0) return;
  with_type(dtype, kOp, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      // The tile kernel takes the row maximum before scaling, which needs a positive scale.
      const bool usable = aligned16(qkv, out) && p.softmax_scale > 0.0f;
      if (usable && try_launch_mma<T>(p, batch, max_seqlen, stream)) return;
    }
    launch_any<T>(p, batch, max_seqlen, stream);
  });
}

}  // namespace fastbert::cuda
