// Attention forward over packed sequences: which kernel, and how it is launched.
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "attention_any.cuh"
#include "attention_mma.cuh"
#include "attention_wgmma.cuh"

namespace fastbert::cuda {
namespace {

constexpr const char* kOp = "attention_fwd";

std::atomic<bool> wgmma_allowed{true};

/// Calls `launch(head_dim, dropout)` with both as constants; false for head dimensions that the
/// tensor core kernels do not know.
template <typename Launch>
bool with_constants(const AttentionForward& p, Launch&& launch) {
  const auto with_dropout = [&](auto head_dim) {
    return p.dropout.active ? launch(head_dim, std::true_type{})
                            : launch(head_dim, std::false_type{});
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

template <typename Tile, typename Kernel>
void launch_tiles(Kernel kernel, AttentionForward p, int64_t batch, int64_t max_seqlen,
                  cudaStream_t stream) {
  p.query_tiles = static_cast<int>(ceil_div<int64_t>(max_seqlen, Tile::kQueries));
  launch(kOp, kernel, grid_extent(batch * p.heads * p.query_tiles, kOp), Tile::kThreads,
         Tile::kSharedBytes, stream, p);
}

/// False when no such kernel is compiled for the head dimension.
template <typename T>
bool try_launch_tensor_cores(const AttentionForward& p, int64_t batch, int64_t max_seqlen,
                             cudaStream_t stream) {
  return with_constants(p, [&](auto head_dim, auto dropout) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    constexpr bool kDropout = decltype(dropout)::value;
    if constexpr (kHeadDim >= 64) {
      if (wgmma_allowed && has_wgmma()) {
        launch_tiles<AttentionWgmmaTile<T, kHeadDim>>(
            attention_fwd_wgmma_kernel<T, kHeadDim, kDropout>, p, batch, max_seqlen, stream);
        return true;
      }
    }
    launch_tiles<AttentionTile<T, kHeadDim>>(attention_fwd_mma_kernel<T, kHeadDim, kDropout>, p,
                                             batch, max_seqlen, stream);
    return true;
  });
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

bool has_wgmma() {
#ifdef FASTBERT_SM_90A  // given by setup.py when that is among the targets
  int device, major, minor;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kOp);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

bool allow_wgmma(bool allowed) { return wgmma_allowed.exchange(allowed); }

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
      if (usable && try_launch_tensor_cores<T>(p, batch, max_seqlen, stream)) return;
    }
    launch_any<T>(p, batch, max_seqlen, stream);
  });
}

}  // namespace fastbert::cuda
