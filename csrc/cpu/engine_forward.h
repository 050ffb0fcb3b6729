// How the engine computes: a model as a list of steps, a batch as stages of pieces.
//
// The tokens' residual stream x (T, H) runs through
//
//   rows     x = LayerNorm(Σ embeddings)                         [Linear  x = projection(x)]
//   and for each layer
//   rows     int8 of x               Linear  qkv = x · Wᵀ + b         attention  context (T, N·D)
//   rows     int8 of context         Linear  sum = x + output(context)
//   rows     x = LayerNorm(sum), int8 of x       Linear  inner = activation(up(x))
//   rows     int8 of inner           Linear  sum = x + down(inner)
//   rows     x = LayerNorm(sum), int8 of x for the next layer
//
// (int8 only where the next Linear has int8 weights). All but attention works row by row, which
// leaves two ways to cut a batch. Many tokens: a piece is a block of rows that goes from one
// attention to the next in one thread, with its intermediate values in that thread's L2. Few
// tokens: each step is a stage of its own, Linears in pieces of columns, and the threads share the
// weights; but q, k, v and attention are one stage, by heads, where heads can be shared out evenly. A
// value depends on its own row and column only, so that the cut changes no bit.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned_buffer.h"
#include "engine_model.h"
#include "linear.h"
#include "ops.h"

namespace fastbert {

struct EngineLinear {
  PackedLinear packed;
  float input_scale;              // fixed scale of the int8 input; 0: each row its own
  const float* input_multiplier;  // of its columns before they are int8; nullptr: none

  bool quantized() const { return packed.kind == Weights::kInt8; }
};

/// Where values of a row lie. kStream is the caller's output; kSum and kInner belong to a block of
/// rows, the others to all tokens.
enum class Buffer { kStream, kSum, kInner, kQkv, kContext };

struct Step {
  enum class Kind { kRows, kLinear, kAttention } kind;

  // kRows: a row of `buffer` is made (kNorm: from kSum) or is there; it is copied to hidden_states
  // [hidden] if hidden >= 0; and it becomes the int8 input of `linear`, unless that takes fp32 or
  // is nullptr.
  enum class Make { kNothing, kEmbeddings, kNorm } make = Make::kNothing;
  Norm norm = {};
  int64_t hidden = -1;

  // kLinear: output = activation(linear(buffer)), plus the stream where `residual`.
  Buffer buffer = Buffer::kStream;
  const EngineLinear* linear = nullptr;
  Buffer output = Buffer::kStream;
  Activation activation = Activation::kNone;
  bool residual = false;

  int64_t heads = 0;  // kAttention: from kQkv to kContext
};

/// A model ready to run.
struct Model {
  const KernelTable* kernels;
  const LinearTable* linears;
  int64_t head_dim, hidden_size, embedding_size;
  float layer_norm_eps;
  Table word, position, token_type;
  std::vector<Step> steps;
  // The longest row of each kind, over the layers: values, and bytes of int8.
  int64_t sum_width, inner_width, qkv_width, context_width, quantized_stride;
};

/// Whole sequences of a request; arrays begin at their first token.
struct Batch {
  const int64_t* input_ids;  // nullptr: word_rows (T, E) in their stead
  const int64_t* position_ids;
  const int64_t* token_type_ids;  // nullptr: row 0 of the table, if there is one
  const float* word_rows;
  const int32_t* cu_seqlens;  // num_sequences + 1, of which the first need not be 0
  int64_t num_sequences, num_tokens;
  float* out;            // (T, H)
  float* hidden_states;  // nullptr, or (L + 1, hidden_tokens, H)
  int64_t hidden_tokens;
};

/// Steps [first_step, last_step) for all tokens: row_parts · column_parts pieces. For attention the
/// row parts are the forward's chunks of queries, the column parts are groups of heads (where it is in
/// one stage with its Linear: a thread's heads, and all chunks).
struct Stage {
  int64_t first_step, last_step, row_parts, column_parts;
};

/// What a forward needs beside the model. Kept from one to the next, it allocates only when it
/// grows.
struct Workspace {
  AlignedBuffer memory;
  std::vector<Stage> stages;
  std::vector<int64_t> first_pieces;  // of the stages, as for_stages() takes them
  std::vector<AttentionPiece> chunks;
};

/// Runs `batch`, which must be valid and hold a token, through the model.
void forward(const Model& model, const Batch& batch, int num_threads, Workspace& workspace);

}  // namespace fastbert
