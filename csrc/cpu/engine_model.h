// The model that an engine is given: named arrays, checked and put in their places.
//
// V words, P positions, K token types, E embedding size, H hidden size, N heads of D channels (a
// layer may have its own N), I intermediate size (likewise). Linears are (out, in) row-major:
//
//   embeddings.word (V, E)  embeddings.position (P, E)  [embeddings.token_type (K, E)]
//   embeddings.norm.{weight, bias} (E)                 [embeddings.projection (H, E)]
//   layers.{i}.qkv (3·N·D, H): rows of queries, of keys, of values
//   layers.{i}.attention_output (H, N·D)               layers.{i}.attention_norm.{weight, bias} (H)
//   layers.{i}.up (I, H)   layers.{i}.down (H, I)      layers.{i}.output_norm.{weight, bias} (H)
//
// A Linear "name" is name.weight and name.bias (out), float32. int8 weights come with
// name.weight_scale (out), float32, and perhaps name.input_scale (1): a fixed scale of their input.
// qkv and up may have name.input_multiplier (H), float32: what the columns of x are multiplied by
// before x is quantised, the residual stream aside (SmoothQuant: the weights hold the inverse).
// Float weights are bf16 (as uint16) or float32, which the engine rounds to bf16.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"
#include "types.h"

namespace fastbert {

/// An array as it came: C-contiguous, and nothing else is known.
struct Tensor {
  const void* data;
  std::string dtype;  // numpy's name; "uint16" holds bf16
  std::vector<int64_t> shape;
};
using Tensors = std::map<std::string, Tensor>;

struct EngineConfig {
  int64_t head_dim;
  double layer_norm_eps;
  Activation activation;        // of the up Linear
  std::vector<int64_t> layers;  // layer l has the parameters "layers.{layers[l]}"
};

/// Rows of embeddings, read where they lie.
struct Table {
  const void* data;  // nullptr: there is none
  DType dtype;       // kFloat32 or kBFloat16
  int64_t rows;
};

struct Norm {
  const float* weight;
  const float* bias;
};

struct LinearSource {
  std::string name;
  enum class Type { kInt8, kBFloat16, kFloat32 } type;
  int64_t out, in;
  const void* weight;
  const float* scale;             // nullptr unless int8
  float input_scale;              // 0: none
  const float* input_multiplier;  // nullptr: none
  const float* bias;
};

struct LayerSource {
  LinearSource qkv, attention_output, up, down;
  Norm attention_norm, output_norm;
};

struct ModelSource {
  int64_t embedding_size, hidden_size;
  Table word, position, token_type;
  Norm embedding_norm;
  std::optional<LinearSource> projection;
  std::map<int64_t, LayerSource> layers;  // by i
};

/// Throws std::invalid_argument, naming the tensor, what came and what was expected, for anything
/// that is missing, not asked for, or not of the right shape, dtype or range.
ModelSource read_model(const EngineConfig& config, const Tensors& tensors);

}  // namespace fastbert
