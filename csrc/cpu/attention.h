// Packed multi-head self-attention (Vaswani et al., arXiv 1706.03762, eq. 1), forward and backward.
//
// A thread takes heads of one sequence (forward: of a chunk of its queries), one after the other, and
// owns every element it writes: nothing is atomic, and neither the number of threads nor the other
// sequences of the batch can change a bit. Each head walks blocks of keys, inside them blocks of
// queries; a block of scores lives in L2, never an S × S matrix. Across blocks of keys the softmax is
// the online one (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
//
// All arithmetic is in S = Compute<T>: tensors are widened when their rows are copied into the
// contiguous scratch that the products need in any case. (Rows of one head lie 3·N·D elements apart:
// walked in place they would fall into a few sets of L1 and each cost a page.)
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "microkernel.h"
#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace fastbert::FASTBERT_ISA {

/// A block of scores. (From 24 × 256 to 96 × 128 and 48 × 512 the speed is the same within 3 %.)
constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 256;

/// Distance of two rows of a block of scores: an odd number of cache lines, since a product with the
/// transposed block walks down a column and at 1 KB apart all its rows would share four sets of L1.
template <class S>
constexpr int64_t kScoreStride = kKeys + 64 / static_cast<int64_t>(sizeof(S));

// Scores are kept in units of log 2: q is multiplied by scale · log2 e when it is copied. 2^x then
// needs neither the multiplication nor the two-step reduction of e^x.
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

/// What every piece of a call shares.
template <class T>
struct Attention {
  using S = Compute<T>;
  Attention(const void* qkv, int64_t tokens, int64_t heads, int64_t dim, double softmax_scale,
            double dropout_p, uint64_t seed, uint32_t offset)
      : qkv(static_cast<const T*>(qkv)),
        tokens(tokens),
        heads(heads),
        dim(dim),
        scale(static_cast<S>(softmax_scale)),
        log2_scale(static_cast<S>(softmax_scale * kLog2E)),
        dropout(make_dropout(dropout_p, seed, offset)),
        kept_scale(static_cast<S>(dropout.scale)) {}

  /// Length of the rows of q, k, v, … in scratch: whole vectors.
  int64_t padded_dim() const { return round_up(dim, kLanes<S>); }
  /// One head's row of q (part 0), k (1) or v (2) in qkv, and of a tensor like out (T, N, D).
  int64_t qkv_row(int64_t token, int64_t part, int64_t head) const {
    return ((token * 3 + part) * heads + head) * dim;
  }
  int64_t qkv_stride() const { return 3 * heads * dim; }
  int64_t out_row(int64_t token, int64_t head) const { return (token * heads + head) * dim; }
  int64_t out_stride() const { return heads * dim; }

  const T* qkv;  // (T, 3, N, D)
  int64_t tokens, heads, dim;
  S scale, log2_scale;
  Dropout dropout;
  S kept_scale;  // of what dropout keeps: goes with the linear ends, out and dout
};

/// What one thread does at a time.
using Piece = AttentionPiece;

/// A block of scores: queries are the `rows` tokens from `first_token` on, keys are positions.
struct Block {
  int64_t head, first_token, rows, first_key, keys;
};

/// The thread's scratch cut into arrays of the given lengths, each aligned to a cache line.
template <class S, size_t kCount>
FASTBERT_INLINE std::array<S*, kCount> scratch_arrays(const int64_t (&lengths)[kCount]) {
  int64_t total = 0;
  for (const int64_t length : lengths) total += round_up(length, 64);
  S* next = thread_scratch<S>(Scratch::kAttention, total);
  std::array<S*, kCount> arrays;
  for (size_t i = 0; i < kCount; ++i) {
    arrays[i] = next;
    next += round_up(lengths[i], 64);
  }
  return arrays;
}

/// body(i, kept) for the rows i of a block; kept(j) is 1 or 0 for each lane of the vector at column j:
/// without dropout the constant 1, which the compiler removes.
template <class S, class Body>
FASTBERT_INLINE void for_rows(const Dropout& dropout, const Block& block, Body body) {
  if (!dropout.active) {
    for (int64_t i = 0; i < block.rows; ++i) body(i, [](int64_t) { return S{1}; });
    return;
  }
  float* mask = thread_scratch<float>(Scratch::kMask, padded_columns(kKeys));
  for (int64_t i = 0; i < block.rows; ++i) {
    dropout_row(dropout, static_cast<uint32_t>(block.first_token + i),
                static_cast<uint32_t>(block.head), block.first_key, block.keys, mask);
    body(i, [mask](int64_t j) FASTBERT_INLINE_LAMBDA { return load<S>(mask + j); });
  }
}

/// Brings rows near. Those about to be written too: a store to a line that is not there holds up the
/// stores behind it until the line has come.
template <class T>
FASTBERT_INLINE void prefetch_rows(const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) {
      __builtin_prefetch(from + i * stride + j, 0, 2);
    }
  }
}

// --------------------------------------------------------------------------------------- forward

/// One step of the online softmax. Per row, with m the maximum so far (none before the first key):
///   m' = max(m, max_j s_j);  p_j = exp(s_j − m');  sum' = sum · exp(m − m') + Σ_j p_j.
/// The scores become keep(p); out, not yet normalised and `width` wide, is brought to m'.
template <class S>
void softmax_block(const Dropout& dropout, const Block& block, S* scores, S* maxima, S* sums,
                   S* out, int64_t width) {
  constexpr int64_t L = kLanes<S>;
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  const int64_t last = round_up(block.keys, L) - L;
  const int64_t tail = block.keys - last;
  // Two loops over the rows, since in one the exponentials of a row would wait for the end of the
  // chain that finds its maximum: a fifth of the time of all this.
  for (int64_t i = 0; i < block.rows; ++i) {
    S* row = scores + i * kScoreStride<S>;
    if (tail < L) store<S>(row + last, keep<S>(load<S>(row + last), splat<S>(kLowest), Part{tail}));
    Vec<S> highest = load<S>(row);
    for (int64_t j = L; j <= last; j += L) highest = max<S>(highest, load<S>(row + j));
    const S top = horizontal_max<S>(highest);
    if (block.first_key == 0) {
      maxima[i] = top;
      sums[i] = 0;
    } else if (top > maxima[i]) {
      const S factor = exp2(splat<S>(maxima[i] - top))[0];
      S* o = out + i * width;
      for (int64_t d = 0; d < width; d += L) store<S>(o + d, factor * load<S>(o + d));
      maxima[i] = top;
      sums[i] *= factor;
    }
  }
  for_rows<S>(dropout, block, [&](int64_t i, auto kept) FASTBERT_INLINE_LAMBDA {
    S* row = scores + i * kScoreStride<S>;
    Vec<S> sum = {};
    for (int64_t j = 0; j <= last; j += L) {
      const Vec<S> p = exp2(load<S>(row + j) - maxima[i]);
      sum += p;
      store<S>(row + j, p * kept(j));
    }
    sums[i] += horizontal_sum<S>(sum);
  });
}

/// out and lse (unless it is nullptr) of one head of a piece.
template <class T>
void attention_fwd_head(const Attention<T>& in, const Piece& piece, int64_t head, T* out,
                        Compute<T>* lse) {
  using S = Compute<T>;
  const int64_t dim = in.dim, width = in.padded_dim(), stride = in.qkv_stride();
  const int64_t queries = piece.queries, first_token = piece.start + piece.first_query;
  const auto [q, keys_t, values, scores, acc, maxima, sums] =
      scratch_arrays<S>({queries * width, round_up(kKeys, kPanel<S>) * dim, kKeys * width,
                         kQueries * kScoreStride<S>, queries * width, queries, queries});

  copy_rows(in.qkv + in.qkv_row(first_token, 0, head), stride, queries, dim, in.log2_scale, q);
  for (int64_t key = 0; key < piece.length; key += kKeys) {
    const int64_t keys = std::min(kKeys, piece.length - key);
    pack_transposed(in.qkv + in.qkv_row(piece.start + key, 1, head), stride, keys, dim, keys_t);
    copy_rows(in.qkv + in.qkv_row(piece.start + key, 2, head), stride, keys, dim, S{1}, values);
    for (int64_t i = 0; i < queries; i += kQueries) {
      const Block block = {head, first_token + i, std::min(kQueries, queries - i), key, keys};
      S* o = acc + i * width;
      if (key == 0) {
        prefetch_rows(out + in.out_row(block.first_token, head), in.out_stride(), block.rows, dim);
      }
      multiply<S>(block.rows, round_up(keys, kLanes<S>), dim, q + i * width, width,
                  panel_major(keys_t, dim), scores, kScoreStride<S>, false);
      softmax_block<S>(in.dropout, block, scores, maxima + i, sums + i, o, width);
      multiply<S>(block.rows, width, keys, scores, kScoreStride<S>, row_major(values, width), o,
                  width, key > 0);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t token = first_token + i;
    if (lse != nullptr) {
      lse[head * in.tokens + token] = static_cast<S>(maxima[i] * kLn2 + std::log(sums[i]));
    }
    write_rows(acc + i * width, 1, dim, in.kept_scale / sums[i], out + in.out_row(token, head),
               in.out_stride());
  }
}

// -------------------------------------------------------------------------------------- backward

/// From a block of scores and of dp = dout · vᵀ, row by row:
///   p = exp(s − lse);  ds = p ∘ (keep(dp) − delta);  scores become keep(p), dp becomes ds.
template <class S>
void softmax_gradient_block(const Dropout& dropout, const Block& block, const S* lse,
                            const S* delta, S* scores, S* dp) {
  for_rows<S>(dropout, block, [&](int64_t i, auto kept) FASTBERT_INLINE_LAMBDA {
    S* s = scores + i * kScoreStride<S>;
    S* g = dp + i * kScoreStride<S>;
    // In two parts, as the rounding of lse · log2 e would scale the whole row.
    const S lse2 = static_cast<S>(lse[i] * kLog2E);
    const S lse2_rest = static_cast<S>(lse[i] * kLog2E - lse2);
    for (int64_t j = 0; j < block.keys; j += kLanes<S>) {
      const Vec<S> p = exp2(load<S>(s + j) - lse2 - lse2_rest);
      store<S>(g + j, p * (load<S>(g + j) * kept(j) - delta[i]));
      store<S>(s + j, p * kept(j));
    }
  });
}

/// dqkv of one head of a piece, which is a whole sequence.
template <class T>
void attention_bwd_head(const Attention<T>& in, const Piece& piece, int64_t head, const T* dout,
                        const T* out, const Compute<T>* lse, T* dqkv) {
  using S = Compute<T>;
  const int64_t dim = in.dim, width = in.padded_dim(), stride = in.qkv_stride();
  const int64_t start = piece.start, length = piece.length;
  const int64_t panels = round_up(kKeys, kPanel<S>) * dim, block_size = kQueries * kScoreStride<S>;
  const auto [q, grad, dq, delta, keys_t, values_t, k, dk, dv, scores, dp] =
      scratch_arrays<S>({length * width, length * width, length * width, length, panels, panels,
                         kKeys * width, kKeys * width, kKeys * width, block_size, block_size});

  copy_rows(in.qkv + in.qkv_row(start, 0, head), stride, length, dim, in.log2_scale, q);
  copy_rows(dout + in.out_row(start, head), in.out_stride(), length, dim, in.kept_scale, grad);
  for (int64_t i = 0; i < length; ++i) {
    const T* out_row = out + in.out_row(start + i, head);
    const T* dout_row = dout + in.out_row(start + i, head);
    delta[i] =
        accumulate<S, 1>(dim, [&](int64_t d, auto lanes, Vec<S>* sum) FASTBERT_INLINE_LAMBDA {
          sum[0] += load<S>(dout_row + d, lanes) * load<S>(out_row + d, lanes);
        }).total[0];
  }
  for (int64_t key = 0; key < length; key += kKeys) {
    const int64_t keys = std::min(kKeys, length - key), columns = round_up(keys, kLanes<S>);
    const T* k_rows = in.qkv + in.qkv_row(start + key, 1, head);
    const T* v_rows = in.qkv + in.qkv_row(start + key, 2, head);
    pack_transposed(k_rows, stride, keys, dim, keys_t);
    pack_transposed(v_rows, stride, keys, dim, values_t);
    copy_rows(k_rows, stride, keys, dim, S{1}, k);
    for (int64_t i = 0; i < length; i += kQueries) {
      const Block block = {head, start + i, std::min(kQueries, length - i), key, keys};
      const S* q_rows = q + i * width;
      const S* grad_rows = grad + i * width;
      for (int64_t part = 0; key == 0 && part < 3; ++part) {
        prefetch_rows(dqkv + in.qkv_row(block.first_token, part, head), stride, block.rows, dim);
      }
      multiply<S>(block.rows, columns, dim, q_rows, width, panel_major(keys_t, dim), scores,
                  kScoreStride<S>, false);
      multiply<S>(block.rows, columns, dim, grad_rows, width, panel_major(values_t, dim), dp,
                  kScoreStride<S>, false);
      softmax_gradient_block<S>(in.dropout, block, lse + head * in.tokens + start + i, delta + i,
                                scores, dp);
      multiply<S, true>(keys, width, block.rows, scores, kScoreStride<S>,
                        row_major(grad_rows, width), dv, width, i > 0);
      multiply<S, true>(keys, width, block.rows, dp, kScoreStride<S>, row_major(q_rows, width), dk,
                        width, i > 0);
      multiply<S>(block.rows, width, keys, dp, kScoreStride<S>, row_major(k, width), dq + i * width,
                  width, key > 0);
    }
    write_rows(dk, keys, dim, static_cast<S>(kLn2), dqkv + in.qkv_row(start + key, 1, head),
               stride);
    write_rows(dv, keys, dim, S{1}, dqkv + in.qkv_row(start + key, 2, head), stride);
  }
  write_rows(dq, length, dim, in.scale, dqkv + in.qkv_row(start, 0, head), stride);
}

// ----------------------------------------------------------------------------------------- calls

/// Asks for the rows of a piece in `tensor` (T, parts, N, D), in the order in which they lie in memory.
/// One head after the other, rows of 128 bytes that are 4608 bytes apart (D = 32, N = 12) are no
/// stream that the hardware would follow: waiting for them took a quarter of the time.
template <class T>
FASTBERT_INLINE void prefetch_piece(const Attention<T>& in, const Piece& piece, const T* tensor,
                                    int64_t parts) {
  if (piece.heads == 1) return;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = (piece.start * parts + part) * in.heads + piece.first_head;
    prefetch_rows(tensor + first * in.dim, parts * in.heads * in.dim, piece.length,
                  piece.heads * in.dim);
  }
}

/// task(piece) for pieces of at most `chunk` queries that together are all heads of all sequences.
/// `row_bytes`: what a head reads and writes of the tensors, a token.
template <class T, class Task>
FASTBERT_INLINE void for_pieces(const Attention<T>& in, const int32_t* cu_seqlens,
                                int64_t num_sequences, int64_t row_bytes, int64_t chunk,
                                int num_threads, const Task& task) {
  constexpr int64_t kPieceBytes = 1 << 20;  // stays in L2 beside the scratch
  constexpr int64_t kThreadWork = 1 << 18;  // multiply-adds that pay for waking a thread
  const int64_t most = (num_sequences + in.tokens / chunk) * in.heads;
  num_threads = std::max(num_threads, 1);
  Piece* pieces = thread_scratch<Piece>(Scratch::kShared, most);
  int64_t count = 0, work = 0;
  // Several heads a piece where that leaves four pieces or more for each thread.
  const int64_t spare = num_sequences * in.heads / (4 * num_threads);
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t start = cu_seqlens[b], length = cu_seqlens[b + 1] - start;
    if (length == 0) continue;
    const int64_t fit = std::min(kPieceBytes / (length * row_bytes), spare);
    const int64_t group = std::clamp<int64_t>(fit, 1, in.heads);
    for (int64_t query = 0; query < length; query += chunk) {
      for (int64_t head = 0; head < in.heads; head += group) {
        pieces[count++] = {start, length,
                           query, std::min(chunk, length - query),
                           head,  std::min(group, in.heads - head)};
      }
    }
    work += 2 * in.heads * length * length * in.dim;
  }
  // The longest first: one that began last would keep a thread busy while the others wait.
  std::sort(pieces, pieces + count, [](const Piece& a, const Piece& b) {
    return a.queries * a.length * a.heads > b.queries * b.length * b.heads;
  });
  const int64_t threads = std::clamp<int64_t>(work / kThreadWork, 1, num_threads);
  parallel_for(count, 1, static_cast<int>(threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(pieces[i]);
  });
}

/// f(T{}) with the storage type that `dtype` names.
template <class F>
FASTBERT_INLINE void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat64:
      return f(double{});
  }
}

/// See KernelTable (ops.h). Pieces are cut by cu_seqlens alone; max_seqlen is for the grids of GPUs.
inline void attention_fwd(const void* qkv, const int32_t* cu_seqlens, int64_t num_sequences,
                          int64_t num_tokens, int64_t heads, int64_t head_dim,
                          int64_t /*max_seqlen*/, double softmax_scale, double dropout_p,
                          uint64_t seed, uint32_t offset, void* out, void* lse, DType dtype,
                          int num_threads) {
  constexpr int64_t kChunk = 512;  // a long sequence is shared among threads
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    const Attention<T> in(qkv, num_tokens, heads, head_dim, softmax_scale, dropout_p, seed, offset);
    const int64_t row_bytes = 4 * head_dim * sizeof(T);
    for_pieces(in, cu_seqlens, num_sequences, row_bytes, kChunk, num_threads,
               [&](const Piece& piece) {
                 prefetch_piece(in, piece, in.qkv, 3);
                 for (int64_t i = 0; i < piece.heads; ++i) {
                   attention_fwd_head(in, piece, piece.first_head + i, static_cast<T*>(out),
                                      static_cast<Compute<T>*>(lse));
                 }
               });
  });
}

/// See KernelTable (ops.h).
inline void attention_piece(const float* qkv, const AttentionPiece& piece, int64_t heads,
                            int64_t head_dim, float* out) {
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  const Attention<float> in(qkv, 0, heads, head_dim, scale, 0.0, 0, 0);
  prefetch_piece(in, piece, in.qkv, 3);
  for (int64_t i = 0; i < piece.heads; ++i) {
    attention_fwd_head<float>(in, piece, piece.first_head + i, out, nullptr);
  }
}

inline void attention_bwd(const void* dout, const void* qkv, const void* out, const void* lse,
                          const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens,
                          int64_t heads, int64_t head_dim, int64_t /*max_seqlen*/,
                          double softmax_scale, double dropout_p, uint64_t seed, uint32_t offset,
                          void* dqkv, DType dtype, int num_threads) {
  constexpr int64_t kWhole = std::numeric_limits<int32_t>::max();
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    const Attention<T> in(qkv, num_tokens, heads, head_dim, softmax_scale, dropout_p, seed, offset);
    const int64_t row_bytes = 8 * head_dim * sizeof(T);
    for_pieces(in, cu_seqlens, num_sequences, row_bytes, kWhole, num_threads,
               [&](const Piece& piece) {
                 prefetch_piece(in, piece, in.qkv, 3);
                 prefetch_piece(in, piece, static_cast<const T*>(dout), 1);
                 prefetch_piece(in, piece, static_cast<const T*>(out), 1);
                 for (int64_t i = 0; i < piece.heads; ++i) {
                   attention_bwd_head(in, piece, piece.first_head + i, static_cast<const T*>(dout),
                                      static_cast<const T*>(out),
                                      static_cast<const Compute<T>*>(lse), static_cast<T*>(dqkv));
                 }
               });
  });
}

}  // namespace fastbert::FASTBERT_ISA
