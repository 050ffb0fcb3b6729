// y = dropout(LayerNorm(word[id] + position[p] + token_type[t])) and the gradients of that sum and
// of LayerNorm's vectors: one warp a token. embedding_gradients.cu turns the former into the tables'.
//
// Rows of up to 1024 columns stay in the warp's registers, gathered once in 16-byte vectors; see
// embed_layer_norm_wide.cuh for other widths and for pointers off 16-byte boundaries.
#include "embed_layer_norm_wide.cuh"

namespace fastbert::cuda {
namespace {

/// The summed embeddings of a token.
template <typename T, int kPerLane>
__device__ __forceinline__ void load_row(const EmbeddingRows<T>& rows, int cols,
                                         RowValues<T, kPerLane>& e) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth, kVectors = Layout::kVectors;
  // All loads first, still packed, so that they are in flight together.
  Packed<T, kWidth> word[kVectors], position[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    word[v].clear();
    position[v].clear();
    if (Layout::col(v) < cols) {
      word[v].load_read_only(rows.word + Layout::col(v));
      position[v].load_read_only(rows.position + Layout::col(v));
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    word[v].unpack(e[v]);
    if (Layout::col(v) < cols) rows.template add<kWidth>(position[v], Layout::col(v), e[v]);
  }
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kForwardBlocksPerSM)
    embed_layer_norm_fwd_kernel(const EmbedForward p) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (token >= p.tokens) return;  // a whole warp
  const int cols = static_cast<int>(p.cols);

  RowValues<T, kPerLane> e;
  load_row<T, kPerLane>(p.embeddings.rows<T>(token, p.cols), cols, e);
  const RowStatistics statistics = row_statistics<T, kPerLane>(e, cols, p.eps);
  statistics.save(p.mean, p.rstd, token);

  const Philox philox(p.dropout);
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    const int col = Layout::col(v);
    if (col < cols) {
      normalize<T, kWidth>(p.weight, p.bias, col, statistics, e[v]);
      drop<kWidth>(philox, p.dropout, token, col, e[v]);
      store<T, kWidth>(static_cast<T*>(p.y) + token * p.cols + col, e[v]);
    }
  }
}

/// Block g takes tokens 4 g + warp, + 4 G, …, and writes row g of the two (G, cols) partial sums.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarpSize* kRowWarps, kBackwardBlocksPerSM)
    embed_layer_norm_bwd_kernel(const EmbedBackward p) {
  using Layout = RowLayout<T, kPerLane>;
  constexpr int kWidth = Layout::kWidth, kVectors = Layout::kVectors;
  const int cols = static_cast<int>(p.cols);
  const Philox philox(p.dropout);
  RowValues<T, kPerLane> dweight = {}, dbias = {};

  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y; token < p.tokens;
       token += step) {
    const int64_t offset = token * p.cols;
    Packed<T, kWidth> packed_dy[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed_dy[v].clear();
      if (Layout::col(v) < cols) {
        packed_dy[v].load_read_only(static_cast<const T*>(p.dy) + offset + Layout::col(v));
      }
    }
    RowValues<T, kPerLane> g, e;
    load_row<T, kPerLane>(p.embeddings.rows<T>(token, p.cols), cols, e);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed_dy[v].unpack(g[v]);
      if (Layout::col(v) < cols) drop<kWidth>(philox, p.dropout, token, Layout::col(v), g[v]);
    }
    row_gradient<T, kPerLane>(p.weight, cols, {p.mean[token], p.rstd[token]}, g, e, dweight, dbias);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (Layout::col(v) < cols) {
        store<T, kWidth>(static_cast<T*>(p.de) + offset + Layout::col(v), g[v]);
      }
    }
  }
  sum_row_warps<T, kPerLane>(dweight, p.partial(0, blockIdx.x), cols);
  sum_row_warps<T, kPerLane>(dbias, p.partial(1, blockIdx.x), cols);
}

Embeddings make_embeddings(const int64_t* input_ids, const int64_t* position_ids,
                           const int64_t* token_type_ids, const void* word, const void* position,
                           const void* token_type, int64_t num_words, int64_t num_positions,
                           int64_t num_token_types, int64_t tokens, const char* op) {
  // An empty tensor has no address: only its ids tell that a table is meant to be there.
  const bool empty =
      num_words < 1 || num_positions < 1 || (token_type_ids != nullptr && num_token_types < 1);
  if (tokens > 0 && empty) {
    throw std::invalid_argument(std::string(op) + ": a table without rows, but tokens to look up");
  }
  return {{input_ids, word, num_words},
          {position_ids, position, num_positions},
          {token_type_ids, token_type, num_token_types}};
}

}  // namespace

void embed_layer_norm_fwd(const int64_t* input_ids, const int64_t* position_ids,
                          const int64_t* token_type_ids, const void* word, const void* position,
                          const void* token_type, const void* weight, const void* bias, void* y,
                          float* mean, float* rstd, int64_t tokens, int64_t cols, int64_t num_words,
                          int64_t num_positions, int64_t num_token_types, double eps,
                          double dropout_p, const int64_t* dropout_seed, int64_t dropout_offset,
                          int dtype, int vector_dtype, cudaStream_t stream) {
  constexpr const char* kOp = "embed_layer_norm_fwd";
  const bool is_float32 = vectors_are_float32(dtype, vector_dtype, kOp);
  const EmbedForward p{
      make_embeddings(input_ids, position_ids, token_type_ids, word, position, token_type,
                      num_words, num_positions, num_token_types, tokens, kOp),
      {weight, is_float32},
      {bias, is_float32},
      y,
      mean,
      rstd,
      tokens,
      cols,
      static_cast<float>(eps),
      make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (tokens == 0 || cols == 0) return;
  const dim3 grid(grid_extent(ceil_div<int64_t>(tokens, kRowWarps), kOp));
  with_layout(
      dtype, cols, aligned16(word, position, token_type, weight, bias, y), kOp,
      [&](auto type, auto per_lane) {
        using T = typename decltype(type)::type;
        launch(kOp, embed_layer_norm_fwd_kernel<T, decltype(per_lane)::value>, grid, kRowBlock, 0,
               stream, p);
      },
      [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        launch(kOp, embed_layer_norm_wide_fwd_kernel<T, decltype(width)::value>, grid, kRowBlock, 0,
               stream, p);
      });
}

int64_t embed_layer_norm_bwd_workspace(int64_t tokens, int64_t cols) {
  return 2 * backward_groups(tokens) * cols;
}

void embed_layer_norm_bwd(const void* dy, const int64_t* input_ids, const int64_t* position_ids,
                          const int64_t* token_type_ids, const void* word, const void* position,
                          const void* token_type, const void* weight, const float* mean,
                          const float* rstd, void* de, void* dweight, void* dbias, float* workspace,
                          int64_t tokens, int64_t cols, int64_t num_words, int64_t num_positions,
                          int64_t num_token_types, double dropout_p, const int64_t* dropout_seed,
                          int64_t dropout_offset, int dtype, int vector_dtype,
                          cudaStream_t stream) {
  constexpr const char* kOp = "embed_layer_norm_bwd";
  const int64_t groups = backward_groups(tokens);
  const EmbedBackward p{
      dy,
      make_embeddings(input_ids, position_ids, token_type_ids, word, position, token_type,
                      num_words, num_positions, num_token_types, tokens, kOp),
      {weight, vectors_are_float32(dtype, vector_dtype, kOp)},
      mean,
      rstd,
      de,
      workspace,
      groups,
      tokens,
      cols,
      make_dropout(dropout_p, dropout_seed, dropout_offset, kOp)};
  if (cols == 0) return;
  with_layout(
      dtype, cols, aligned16(dy, word, position, token_type, weight, de), kOp,
      [&](auto type, auto per_lane) {
        using T = typename decltype(type)::type;
        launch(kOp, embed_layer_norm_bwd_kernel<T, decltype(per_lane)::value>,
               dim3(static_cast<unsigned>(groups)), kRowBlock, row_shared_bytes(cols), stream, p);
      },
      [&](auto type, auto width) {
        using T = typename decltype(type)::type;
        constexpr int kWidth = decltype(width)::value;
        if (tokens > 0) {
          launch(kOp, embed_layer_norm_wide_bwd_kernel<T, kWidth>,
                 dim3(grid_extent(ceil_div<int64_t>(tokens, kRowWarps), kOp)), kRowBlock, 0, stream,
                 p);
        }
        const int64_t column_blocks = ceil_div<int64_t>(cols, kWarpSize * kWidth);
        launch(kOp, embed_layer_norm_wide_sums_kernel<T, kWidth>,
               dim3(grid_extent(column_blocks, kOp), static_cast<unsigned>(groups)),
               dim3(kWarpSize, kColumnWarps), kColumnSharedBytes<kWidth>, stream, p);
      });
  sum_groups(workspace, {{dweight, dbias, nullptr}, vector_dtype}, groups, cols, kOp, stream);
}

}  // namespace fastbert::cuda
