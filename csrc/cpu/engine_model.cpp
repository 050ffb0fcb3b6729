#include "engine_model.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>

namespace fastbert {
namespace {

constexpr int64_t kAny = -1;  // a dimension that the tensor itself decides

/// Products of int8 sum up in int32: |q| ≤ 127, and a unit may shift one factor by 128.
constexpr int64_t kMostInputs = 65536;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (shape[i] == kAny ? "*" : std::to_string(shape[i]));
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

bool fits(const std::vector<int64_t>& shape, const std::vector<int64_t>& expected) {
  return std::equal(
      shape.begin(), shape.end(), expected.begin(), expected.end(),
      [](int64_t have, int64_t want) { return want == kAny ? have >= 1 : have == want; });
}

[[noreturn]] void fail(const std::string& name, const std::string& problem) {
  throw std::invalid_argument(name + ": " + problem);
}

/// Gives out tensors by name, checked, and knows in the end which were not asked for.
class Reader {
 public:
  explicit Reader(const Tensors& tensors) : tensors_(tensors) {}

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }

  const Tensor& get(const std::string& name, const std::vector<std::string>& dtypes,
                    const std::vector<int64_t>& shape) {
    std::string expected;
    for (const std::string& dtype : dtypes) expected += (expected.empty() ? "" : " or ") + dtype;
    expected += " of shape " + shape_text(shape);
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail(name, "missing, expected " + expected);
    const Tensor& tensor = found->second;
    const bool known = std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end();
    if (!known || !fits(tensor.shape, shape)) {
      fail(name, "got " + tensor.dtype + " of shape " + shape_text(tensor.shape) + ", expected " +
                     expected);
    }
    used_.insert(name);
    return tensor;
  }

  const float* floats(const std::string& name, int64_t count) {
    return static_cast<const float*>(get(name, {"float32"}, {count}).data);
  }

  /// Scales: what is divided by must be a positive number.
  const float* scales(const std::string& name, int64_t count) {
    const float* values = floats(name, count);
    for (int64_t i = 0; i < count; ++i) {
      if (!(values[i] > 0 && std::isfinite(values[i]))) {
        fail(name, "element " + std::to_string(i) + " is " + std::to_string(values[i]) +
                       ", expected a positive finite scale");
      }
    }
    return values;
  }

  Table table(const std::string& name, int64_t cols) {
    const Tensor& tensor = get(name, {"float32", "uint16"}, {kAny, cols});
    const DType dtype = tensor.dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
    return {tensor.data, dtype, tensor.shape[0]};
  }

  Norm norm(const std::string& name, int64_t cols) {
    return {floats(name + ".weight", cols), floats(name + ".bias", cols)};
  }

  LinearSource linear(const std::string& name, int64_t out, int64_t in) {
    using Type = LinearSource::Type;
    const Tensor& weight = get(name + ".weight", {"int8", "uint16", "float32"}, {out, in});
    LinearSource linear{};
    linear.name = name;
    linear.type = weight.dtype == "int8"     ? Type::kInt8
                  : weight.dtype == "uint16" ? Type::kBFloat16
                                             : Type::kFloat32;
    linear.out = weight.shape[0];
    linear.in = weight.shape[1];
    linear.weight = weight.data;
    linear.bias = floats(name + ".bias", linear.out);
    if (linear.type == Type::kInt8) {
      if (linear.in > kMostInputs) {
        fail(name + ".weight", "got " + std::to_string(linear.in) + " int8 columns, expected " +
                                   std::to_string(kMostInputs) + " at most");
      }
      linear.scale = scales(name + ".weight_scale", linear.out);
      if (has(name + ".input_scale")) linear.input_scale = *scales(name + ".input_scale", 1);
    }
    return linear;
  }

  /// A Linear that reads the residual stream.
  LinearSource stream_linear(const std::string& name, int64_t out, int64_t in) {
    LinearSource source = linear(name, out, in);
    const std::string multiplier = name + ".input_multiplier";
    if (source.type == LinearSource::Type::kInt8 && has(multiplier)) {
      source.input_multiplier = scales(multiplier, in);
    }
    return source;
  }

  void expect_all_used() const {
    for (const auto& [name, tensor] : tensors_) {
      if (used_.count(name) == 0) {
        fail(name, "got " + tensor.dtype + " of shape " + shape_text(tensor.shape) +
                       ", expected no tensor of this name");
      }
    }
  }

 private:
  const Tensors& tensors_;
  std::set<std::string> used_;
};

LayerSource read_layer(Reader& reader, const std::string& name, int64_t hidden, int64_t head_dim) {
  LayerSource layer;
  layer.qkv = reader.stream_linear(name + ".qkv", kAny, hidden);
  if (layer.qkv.out % (3 * head_dim) != 0) {
    fail(name + ".qkv.weight",
         "got " + std::to_string(layer.qkv.out) +
             " rows, expected a multiple of 3 · head_dim = " + std::to_string(3 * head_dim));
  }
  layer.attention_output = reader.linear(name + ".attention_output", hidden, layer.qkv.out / 3);
  layer.attention_norm = reader.norm(name + ".attention_norm", hidden);
  layer.up = reader.stream_linear(name + ".up", kAny, hidden);
  layer.down = reader.linear(name + ".down", hidden, layer.up.out);
  layer.output_norm = reader.norm(name + ".output_norm", hidden);
  return layer;
}

void check_config(const EngineConfig& config) {
  constexpr int64_t kMostHeadDim = 4096;
  if (config.head_dim < 1 || config.head_dim > kMostHeadDim) {
    fail("head_dim", "got " + std::to_string(config.head_dim) + ", expected 1 … " +
                         std::to_string(kMostHeadDim));
  }
  if (!(config.layer_norm_eps >= 0 && std::isfinite(config.layer_norm_eps))) {
    fail("layer_norm_eps",
         "got " + std::to_string(config.layer_norm_eps) + ", expected a finite number ≥ 0");
  }
  if (config.layers.empty()) fail("layers", "got none, expected one or more");
  for (const int64_t i : config.layers) {
    if (i < 0) fail("layers", "got " + std::to_string(i) + ", expected indices ≥ 0");
  }
}

}  // namespace

ModelSource read_model(const EngineConfig& config, const Tensors& tensors) {
  check_config(config);
  Reader reader(tensors);
  ModelSource model{};
  model.word = reader.table("embeddings.word", kAny);
  model.embedding_size = tensors.at("embeddings.word").shape[1];
  const int64_t embedding = model.embedding_size;
  model.position = reader.table("embeddings.position", embedding);
  if (reader.has("embeddings.token_type")) {
    model.token_type = reader.table("embeddings.token_type", embedding);
  }
  model.embedding_norm = reader.norm("embeddings.norm", embedding);
  model.hidden_size = embedding;
  if (reader.has("embeddings.projection.weight")) {
    model.projection = reader.linear("embeddings.projection", kAny, embedding);
    model.hidden_size = model.projection->out;
  }
  for (const int64_t i : config.layers) {
    if (model.layers.count(i) != 0) continue;
    const std::string name = "layers." + std::to_string(i);
    model.layers[i] = read_layer(reader, name, model.hidden_size, config.head_dim);
  }
  reader.expect_all_used();
  return model;
}

}  // namespace fastbert
