// The inference engine: a whole encoder in one call, without torch.
//
//   packed tokens (T) -> hidden states (T, H)
//
// int8 Linears multiply integers (linear.h has the equations), float Linears bf16 weights; residual
// stream, LayerNorm, softmax and activations are fp32. The bits of a token's result depend on its
// own sequence alone: not on the other sequences, nor on the number of threads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "aligned_buffer.h"
#include "engine_forward.h"
#include "engine_model.h"

namespace fastbert {

class Engine {
 public:
  /// Checks the tensors and packs the weights for the ISA in use, which stays this engine's. The
  /// tables embeddings.{word, position, token_type} are read where they lie and must outlive the
  /// engine; nothing else is looked at again. Throws std::invalid_argument as read_model() does.
  Engine(const EngineConfig& config, const Tensors& tensors);
  Engine(const Engine&) = delete;

  /// Fills batch.out and, if given, batch.hidden_states: x after the embeddings (and their
  /// projection) and after each layer. Exactly one of batch.input_ids and batch.word_rows is given.
  /// Several threads may call at once. Throws std::invalid_argument if an id is outside its table
  /// or cu_seqlens does not go from 0 to num_tokens.
  void run(const Batch& batch, int num_threads);

  const std::string& isa() const { return isa_; }
  size_t packed_bytes() const { return memory_.size(); }
  int64_t embedding_size() const { return model_.embedding_size; }
  int64_t hidden_size() const { return model_.hidden_size; }
  int64_t num_layers() const { return num_layers_; }

 private:
  struct Layer {
    EngineLinear qkv, attention_output, up, down;
    Norm attention_norm, output_norm;
  };
  class Packer;

  // Copies and packs into memory_ what the source points to, tables excepted.
  void take(const ModelSource& source);
  void take(const ModelSource& source, Packer packer);
  void measure(const Layer& layer);  // widens model_'s rows to the layer's
  void build_steps(const EngineConfig& config, bool projected);

  void check(const Batch& batch) const;
  Batch part_of(const Batch& batch, int64_t first, int64_t last) const;
  std::unique_ptr<Workspace> borrow();
  void give_back(std::unique_ptr<Workspace> workspace);

  const std::string isa_;
  const int64_t num_layers_;
  AlignedBuffer memory_;  // of the weights
  Norm embedding_norm_ = {};
  EngineLinear projection_ = {};
  std::map<int64_t, Layer> layers_;  // by their names' index
  Model model_ = {};

  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;  // as many as have run at once
};

}  // namespace fastbert
