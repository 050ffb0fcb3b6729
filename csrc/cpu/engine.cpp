#include "engine.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

#include "bfloat16.h"
#include "checks.h"
#include "dispatch.h"
#include "parallel.h"

namespace fastbert {
namespace {

/// A batch goes through the model in parts of whole sequences of about so many tokens. That bounds
/// the workspace, and costs one more reading of the weights a part.
int64_t part_tokens(int num_threads) {
  constexpr int64_t kEnough = 512, kEnoughForThread = 128;
  return std::max(kEnough, kEnoughForThread * num_threads);
}

/// Writes the packed form of `source` to `packed`, and with int8 weights their column sums; false
/// if there is a -128 among these.
bool pack(const LinearTable& linears, const LinearSource& source, void* packed, float* sums) {
  const int64_t count = source.out * source.in;
  if (source.type == LinearSource::Type::kInt8) {
    const int8_t* q = static_cast<const int8_t*>(source.weight);
    bool lowest = false;
    for (int64_t i = 0; i < count; ++i) lowest |= q[i] == -128;
    if (lowest) return false;
    linears.pack(Weights::kInt8, q, source.in, source.out, packed);
    sum_columns(q, source.scale, source.in, source.out, sums);
    return true;
  }
  std::vector<uint16_t> rounded;
  const void* weight = source.weight;
  if (source.type == LinearSource::Type::kFloat32) {
    const float* values = static_cast<const float*>(weight);
    rounded.resize(count);
    std::transform(values, values + count, rounded.begin(), to_bfloat16);
    weight = rounded.data();
  }
  linears.pack(Weights::kBFloat16, weight, source.in, source.out, packed);
  return true;
}

}  // namespace

/// Places everything that the engine keeps into one memory. Runs twice: the first time the arena
/// only measures; the second, Linears are noted, and pack() packs them side by side.
class Engine::Packer {
 public:
  Packer(Arena& arena, const LinearTable& linears) : arena_(arena), linears_(linears) {}

  const float* copy(const float* from, int64_t count, int64_t padded) {
    float* const to = arena_.take<float>(padded);
    if (!arena_.measuring()) std::fill(std::copy(from, from + count, to), to + padded, 0.0f);
    return to;
  }

  Norm norm(const Norm& from, int64_t cols) {
    return {copy(from.weight, cols, cols), copy(from.bias, cols, cols)};
  }

  EngineLinear linear(const LinearSource& from) {
    const bool int8 = from.type == LinearSource::Type::kInt8;
    const int64_t padded = (from.out + kColumnBlock - 1) / kColumnBlock * kColumnBlock;
    EngineLinear linear{};
    linear.packed.kind = int8 ? Weights::kInt8 : Weights::kBFloat16;
    linear.packed.in = from.in;
    linear.packed.out = from.out;
    char* const weights =
        arena_.take<char>(linears_.packed_bytes(linear.packed.kind, from.in, from.out));
    linear.packed.weights = weights;
    float* sums = nullptr;
    if (int8) {
      linear.packed.scale = copy(from.scale, from.out, padded);
      linear.packed.column_sum = sums = arena_.take<float>(padded);
      if (!arena_.measuring()) std::fill(sums + from.out, sums + padded, 0.0f);
    }
    linear.packed.bias = copy(from.bias, from.out, padded);
    linear.input_scale = from.input_scale;
    if (from.input_multiplier != nullptr) {
      linear.input_multiplier = copy(from.input_multiplier, from.in, from.in);
    }
    if (!arena_.measuring()) jobs_.push_back({&from, weights, sums});
    return linear;
  }

  /// Throws std::invalid_argument for a -128.
  void pack() const {
    std::atomic<const LinearSource*> refused{nullptr};
    const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    parallel_for(static_cast<int64_t>(jobs_.size()), 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Job& job = jobs_[i];
        if (!fastbert::pack(linears_, *job.source, job.packed, job.sums)) {
          refused = job.source;
        }
      }
    });
    if (const LinearSource* source = refused) {
      throw std::invalid_argument(source->name +
                                  ".weight: got -128, expected int8 from -127 to 127");
    }
  }

 private:
  struct Job {
    const LinearSource* source;
    void* packed;
    float* sums;
  };
  Arena& arena_;
  const LinearTable& linears_;
  std::vector<Job> jobs_;
};

namespace {

using Kind = Step::Kind;
using Make = Step::Make;

/// `buffer` becomes (kNothing: already is) the input of `next`, or the end.
Step rows_step(Make make, const Norm& norm, Buffer buffer, const EngineLinear* next) {
  Step step{Kind::kRows};
  step.make = make;
  step.norm = norm;
  step.buffer = buffer;
  step.linear = next;
  return step;
}

Step linear_step(Buffer input, const EngineLinear& linear, Buffer output) {
  Step step{Kind::kLinear};
  step.buffer = input;
  step.linear = &linear;
  step.output = output;
  step.residual = output == Buffer::kSum;
  return step;
}

}  // namespace

Engine::Engine(const EngineConfig& config, const Tensors& tensors)
    : isa_(fastbert::isa()), num_layers_(static_cast<int64_t>(config.layers.size())) {
  const ModelSource source = read_model(config, tensors);
  model_.kernels = &kernels();
  model_.linears = &linear_kernels();
  model_.head_dim = config.head_dim;
  model_.hidden_size = source.hidden_size;
  model_.embedding_size = source.embedding_size;
  model_.layer_norm_eps = static_cast<float>(config.layer_norm_eps);
  model_.word = source.word;
  model_.position = source.position;
  model_.token_type = source.token_type;
  take(source);
  model_.sum_width = std::max(source.embedding_size, source.hidden_size);
  if (source.projection) {
    model_.quantized_stride = model_.linears->quantized_stride(source.embedding_size);
  }
  for (const auto& [index, layer] : layers_) measure(layer);
  build_steps(config, source.projection.has_value());
}

void Engine::take(const ModelSource& source) {
  Arena size(nullptr);
  take(source, Packer(size, *model_.linears));
  memory_ = AlignedBuffer(size.bytes());
  Arena arena(memory_.data());
  take(source, Packer(arena, *model_.linears));
}

void Engine::take(const ModelSource& source, Packer packer) {
  embedding_norm_ = packer.norm(source.embedding_norm, source.embedding_size);
  if (source.projection) projection_ = packer.linear(*source.projection);
  for (const auto& [index, from] : source.layers) {
    Layer& to = layers_[index];
    to.qkv = packer.linear(from.qkv);
    to.attention_output = packer.linear(from.attention_output);
    to.attention_norm = packer.norm(from.attention_norm, source.hidden_size);
    to.up = packer.linear(from.up);
    to.down = packer.linear(from.down);
    to.output_norm = packer.norm(from.output_norm, source.hidden_size);
  }
  packer.pack();
}

void Engine::measure(const Layer& layer) {
  Model& m = model_;
  m.qkv_width = std::max(m.qkv_width, layer.qkv.packed.out);
  m.context_width = std::max(m.context_width, layer.attention_output.packed.in);
  m.inner_width = std::max(m.inner_width, layer.up.packed.out);
  for (const EngineLinear* linear : {&layer.qkv, &layer.attention_output, &layer.up, &layer.down}) {
    const int64_t stride = m.linears->quantized_stride(linear->packed.in);
    m.quantized_stride = std::max(m.quantized_stride, stride);
  }
}

void Engine::build_steps(const EngineConfig& config, bool projected) {
  std::vector<Step>& steps = model_.steps;
  const EngineLinear* next = &layers_.at(config.layers.front()).qkv;
  if (projected) {
    steps.push_back(rows_step(Make::kEmbeddings, embedding_norm_, Buffer::kSum, &projection_));
    steps.push_back(linear_step(Buffer::kSum, projection_, Buffer::kStream));
    steps.push_back(rows_step(Make::kNothing, {}, Buffer::kStream, next));
  } else {
    steps.push_back(rows_step(Make::kEmbeddings, embedding_norm_, Buffer::kStream, next));
  }
  steps.back().hidden = 0;
  for (int64_t l = 0; l < num_layers_; ++l) {
    const Layer& layer = layers_.at(config.layers[l]);
    steps.push_back(linear_step(Buffer::kStream, layer.qkv, Buffer::kQkv));
    Step attention{Kind::kAttention};
    attention.heads = layer.attention_output.packed.in / config.head_dim;
    steps.push_back(attention);
    steps.push_back(rows_step(Make::kNothing, {}, Buffer::kContext, &layer.attention_output));
    steps.push_back(linear_step(Buffer::kContext, layer.attention_output, Buffer::kSum));
    steps.push_back(rows_step(Make::kNorm, layer.attention_norm, Buffer::kStream, &layer.up));
    steps.push_back(linear_step(Buffer::kStream, layer.up, Buffer::kInner));
    steps.back().activation = config.activation;
    steps.push_back(rows_step(Make::kNothing, {}, Buffer::kInner, &layer.down));
    steps.push_back(linear_step(Buffer::kInner, layer.down, Buffer::kSum));
    const bool end = l + 1 == num_layers_;
    next = end ? nullptr : &layers_.at(config.layers[l + 1]).qkv;
    steps.push_back(rows_step(Make::kNorm, layer.output_norm, Buffer::kStream, next));
    steps.back().hidden = l + 1;
  }
}

// ----------------------------------------------------------------------------------------- running

void Engine::check(const Batch& batch) const {
  const int64_t tokens = batch.num_tokens;
  check_cu_seqlens(batch.cu_seqlens, batch.num_sequences, tokens, tokens);
  if (batch.input_ids != nullptr) check_ids("input_ids", batch.input_ids, tokens, model_.word.rows);
  check_ids("position_ids", batch.position_ids, tokens, model_.position.rows);
  if (batch.token_type_ids != nullptr) {
    check_ids("token_type_ids", batch.token_type_ids, tokens, model_.token_type.rows);
  }
}

void Engine::run(const Batch& batch, int num_threads) {
  check(batch);
  if (batch.num_tokens == 0) return;
  // More threads than a machine has are a mistake, and each would cost a stack and a workspace.
  constexpr int kMostThreads = 512;
  const ThreadShare threads(std::clamp(num_threads, 1, kMostThreads));
  std::unique_ptr<Workspace> workspace = borrow();
  const int64_t most = part_tokens(threads.count());
  const int64_t parts = (batch.num_tokens + most - 1) / most;
  const int64_t enough = (batch.num_tokens + parts - 1) / parts;
  for (int64_t first = 0, last; first < batch.num_sequences; first = last) {
    for (last = first + 1; last < batch.num_sequences; ++last) {
      if (batch.cu_seqlens[last] - batch.cu_seqlens[first] >= enough) break;
    }
    const Batch part = part_of(batch, first, last);
    if (part.num_tokens > 0) forward(model_, part, threads.count(), *workspace);
  }
  give_back(std::move(workspace));
}

Batch Engine::part_of(const Batch& batch, int64_t first, int64_t last) const {
  const int64_t token = batch.cu_seqlens[first];
  const auto skip = [token](auto* array, int64_t cols) {
    return array == nullptr ? nullptr : array + token * cols;
  };
  Batch part = batch;
  part.input_ids = skip(batch.input_ids, 1);
  part.position_ids = skip(batch.position_ids, 1);
  part.token_type_ids = skip(batch.token_type_ids, 1);
  part.word_rows = skip(batch.word_rows, model_.embedding_size);
  part.cu_seqlens = batch.cu_seqlens + first;
  part.num_sequences = last - first;
  part.num_tokens = batch.cu_seqlens[last] - token;
  part.out = skip(batch.out, model_.hidden_size);
  part.hidden_states = skip(batch.hidden_states, model_.hidden_size);
  return part;
}

std::unique_ptr<Workspace> Engine::borrow() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return std::make_unique<Workspace>();
  std::unique_ptr<Workspace> workspace = std::move(idle_.back());
  idle_.pop_back();
  return workspace;
}

void Engine::give_back(std::unique_ptr<Workspace> workspace) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(workspace));
}

}  // namespace fastbert
