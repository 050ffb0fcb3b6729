// y = dropout(LayerNorm(word[id] + position[p] + token_type[k])), and its gradients. The sum of the
// embeddings is never stored: the backward gathers it again.
//
// The gradient of a table has no atomics: tokens are grouped by their id (stable counting sort) and
// each row of the table sums its own tokens in ascending order.
#pragma once

#include "layer_norm.h"
#include "philox.h"

namespace fastbert::FASTBERT_ISA {

/// The ids and tables of the op; token_type_ids and token_type are nullptr together.
template <class T>
struct Embeddings {
  const int64_t* input_ids;
  const int64_t* position_ids;
  const int64_t* token_type_ids;
  const T* word;
  const T* position;
  const T* token_type;

  /// out = the token's embedding before LayerNorm; returns the sum of its elements.
  template <class S>
  FASTBERT_INLINE S gather(int64_t token, int64_t cols, S* out) const {
    const T* word_row = word + input_ids[token] * cols;
    const T* position_row = position + position_ids[token] * cols;
    const T* type_row = token_type == nullptr ? nullptr : token_type + token_type_ids[token] * cols;
    const auto sums =
        accumulate<S, 1>(cols, [=](int64_t i, auto lanes, Vec<S>* acc) FASTBERT_INLINE_LAMBDA {
          Vec<S> e = load<S>(word_row + i, lanes) + load<S>(position_row + i, lanes);
          if (type_row != nullptr) e += load<S>(type_row + i, lanes);
          store<S>(out + i, e, lanes);
          acc[0] += e;
        });
    return sums.total[0];
  }
};

inline void embed_layer_norm_fwd(const int64_t* input_ids, const int64_t* position_ids,
                                 const int64_t* token_type_ids, const void* word,
                                 const void* position, const void* token_type,
                                 const void* weight_ptr, const void* bias_ptr, int64_t rows,
                                 int64_t cols, int64_t /*vocab*/, int64_t /*positions*/,
                                 int64_t /*types*/, double eps, double dropout_p, uint64_t seed,
                                 uint32_t offset, void* y_ptr, void* mean_ptr, void* rstd_ptr,
                                 DType dtype, DType vector_dtype, int num_threads) {
  const Dropout dropout = make_dropout(dropout_p, seed, offset);
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const Embeddings<T> embeddings{input_ids,
                                   position_ids,
                                   token_type_ids,
                                   static_cast<const T*>(word),
                                   static_cast<const T*>(position),
                                   static_cast<const T*>(token_type)};
    const V* weight = static_cast<const V*>(weight_ptr);
    const V* bias = static_cast<const V*>(bias_ptr);
    S* means = static_cast<S*>(mean_ptr);
    S* rstds = static_cast<S*>(rstd_ptr);

    parallel_for(rows, row_grain(cols), num_threads, [=](int64_t begin, int64_t end) {
      S* e = thread_scratch<S>(Scratch::kRow, cols);
      float* mask = dropout_scratch(dropout, cols);
      const S kept_scale = static_cast<S>(dropout.scale);
      for (int64_t row = begin; row < end; ++row) {
        T* y = row_of<T>(y_ptr, row, cols);
        if (dropout.active) dropout_row(dropout, static_cast<uint32_t>(row), 0, 0, cols, mask);
        const S sum = embeddings.template gather<S>(row, cols, e);
        const auto statistics = row_statistics<S>(e, cols, sum, static_cast<S>(eps));
        for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
          const Vec<S> x_hat = (load<S>(e + i, lanes) - statistics.mean) * statistics.rstd;
          Vec<S> value = x_hat * load<S>(weight + i, lanes) + load<S>(bias + i, lanes);
          if (dropout.active) value *= kept_scale * load<S>(mask + i, lanes);
          store<S>(y + i, value, lanes);
        });
        means[row] = statistics.mean;
        rstds[row] = statistics.rstd;
      }
    });
  });
}

/// Makes `count` elements 0, and writes only where they are not. The gradient of a table of words is 0
/// in nearly all rows, and was in the memory's former use, if that was such a gradient too: to see it
/// takes a third of the time of writing it.
template <class T>
FASTBERT_INLINE void clear(T* out, int64_t count) {
  constexpr int64_t kStep = FASTBERT_VECTOR_BYTES / sizeof(T);
  BitsVec found = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) found |= load_raw<BitsVec>(out + i);
  uint32_t any = 0;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) any |= found[lane];
  const int64_t clean = any == 0 ? i : 0;
  __builtin_memset(out + clean, 0, (count - clean) * sizeof(T));
}

/// dtable[id] = Σ of `grads` rows of the tokens with that id; rows without tokens become 0.
template <class S, class T>
void scatter_sum(const S* grads, const int64_t* ids, int64_t tokens, int64_t cols,
                 int64_t table_rows, T* dtable, int num_threads) {
  // order[first[id] … first[id + 1]) are the id's tokens, ascending.
  int64_t* first = thread_scratch<int64_t>(Scratch::kShared, table_rows + 1 + tokens);
  int64_t* order = first + table_rows + 1;
  __builtin_memset(first, 0, (table_rows + 1) * sizeof(int64_t));
  for (int64_t token = 0; token < tokens; ++token) ++first[ids[token]];
  for (int64_t id = 1; id <= table_rows; ++id) first[id] += first[id - 1];
  // Now first[id] is where the id's tokens end; filling from the back turns ends into starts.
  for (int64_t token = tokens - 1; token >= 0; --token) order[--first[ids[token]]] = token;

  // A table of few rows (token types) is also split by columns, or there would be no parallelism.
  constexpr int64_t kFewRows = 64;
  const int64_t width = table_rows < kFewRows ? 4 * kLanes<S> : cols;
  const int64_t strips = (cols + width - 1) / width;
  const int64_t grain = table_rows * strips / 256 + 1;
  parallel_for(table_rows * strips, grain, num_threads, [=](int64_t begin, int64_t end) {
    S* sum = thread_scratch<S>(Scratch::kRow, width);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t id = piece / strips;
      const int64_t column = piece % strips * width;
      const int64_t count = cols - column < width ? cols - column : width;
      T* out = dtable + id * cols + column;
      if (first[id] == first[id + 1]) {
        clear(out, count);
        continue;
      }
      __builtin_memset(sum, 0, count * sizeof(S));
      for (int64_t k = first[id]; k < first[id + 1]; ++k) {
        const S* grad = grads + order[k] * cols + column;
        for_vectors<S>(count, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
          store<S>(sum + i, load<S>(sum + i, lanes) + load<S>(grad + i, lanes), lanes);
        });
      }
      for_vectors<S>(count, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
        store<S>(out + i, load<S>(sum + i, lanes), lanes);
      });
    }
  });
}

inline void embed_layer_norm_bwd(const void* dy_ptr, const int64_t* input_ids,
                                 const int64_t* position_ids, const int64_t* token_type_ids,
                                 const void* word, const void* position, const void* token_type,
                                 const void* weight_ptr, const void* mean_ptr, const void* rstd_ptr,
                                 int64_t rows, int64_t cols, int64_t vocab, int64_t positions,
                                 int64_t types, double dropout_p, uint64_t seed, uint32_t offset,
                                 void* dword, void* dposition, void* dtoken_type, void* dweight_ptr,
                                 void* dbias_ptr, DType dtype, DType vector_dtype,
                                 int num_threads) {
  const Dropout dropout = make_dropout(dropout_p, seed, offset);
  with_dtypes(dtype, vector_dtype, [=](auto t, auto v) {
    using T = typename decltype(t)::type;
    using V = typename decltype(v)::type;
    using S = Compute<T>;
    const Embeddings<T> embeddings{input_ids,
                                   position_ids,
                                   token_type_ids,
                                   static_cast<const T*>(word),
                                   static_cast<const T*>(position),
                                   static_cast<const T*>(token_type)};
    const V* weight = static_cast<const V*>(weight_ptr);
    const S* mean = static_cast<const S*>(mean_ptr);
    const S* rstd = static_cast<const S*>(rstd_ptr);

    S* grads = thread_scratch<S>(Scratch::kRows, rows * cols);
    const RowBlocks blocks(rows);
    const ColumnSums<S, 2> sums(blocks, cols);
    parallel_for(blocks.count, 1, num_threads, [=](int64_t first, int64_t last) {
      S* e = thread_scratch<S>(Scratch::kRow, cols);
      S* upstream = thread_scratch<S>(Scratch::kGradRow, cols);
      float* mask = dropout_scratch(dropout, cols);
      const S kept_scale = static_cast<S>(dropout.scale);
      for (int64_t block = first; block < last; ++block) {
        S* dweight = sums.start(block);
        S* dbias = dweight + cols;
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
          const T* dy = row_of<const T>(dy_ptr, row, cols);
          S* grad = grads + row * cols;
          if (dropout.active) dropout_row(dropout, static_cast<uint32_t>(row), 0, 0, cols, mask);
          for_vectors<S>(cols, [=](int64_t i, auto lanes) FASTBERT_INLINE_LAMBDA {
            Vec<S> value = load<S>(dy + i, lanes);
            if (dropout.active) value *= kept_scale * load<S>(mask + i, lanes);
            store<S>(upstream + i, value, lanes);
          });
          embeddings.template gather<S>(row, cols, e);
          layer_norm_bwd_row<S>(upstream, e, weight, RowStatistics<S>{mean[row], rstd[row]}, cols,
                                dweight, dbias,
                                [=](int64_t i, auto lanes, Vec<S> de)
                                    FASTBERT_INLINE_LAMBDA { store<S>(grad + i, de, lanes); });
        }
      }
    });
    sums.finish(0, static_cast<V*>(dweight_ptr), num_threads);
    sums.finish(1, static_cast<V*>(dbias_ptr), num_threads);
    scatter_sum(grads, input_ids, rows, cols, vocab, static_cast<T*>(dword), num_threads);
    scatter_sum(grads, position_ids, rows, cols, positions, static_cast<T*>(dposition),
                num_threads);
    if (dtoken_type != nullptr) {
      scatter_sum(grads, token_type_ids, rows, cols, types, static_cast<T*>(dtoken_type),
                  num_threads);
    }
  });
}

}  // namespace fastbert::FASTBERT_ISA
