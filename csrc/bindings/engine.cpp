// fastbert._cpu.Engine: the inference engine of csrc/cpu/engine.h, on numpy arrays.
#include "../cpu/engine.h"

#include <pybind11/stl.h>

#include "arrays.h"

namespace py = pybind11;

namespace {

using fastbert::Activation;
using fastbert::Batch;
using fastbert::Engine;
using fastbert::EngineConfig;
using fastbert::Tensors;
using fastbert::bindings::dtype_of;
using fastbert::bindings::elements;
using fastbert::bindings::given_elements;
using fastbert::bindings::is_plain;

Tensors tensors_from(const py::dict& arrays) {
  Tensors tensors;
  for (const auto& [key, value] : arrays) {
    const auto name = key.cast<std::string>();
    if (!py::isinstance<py::array>(value)) {
      throw py::value_error(name + ": got " + std::string(py::str(py::type::of(value))) +
                            ", expected a numpy array");
    }
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!is_plain(array)) {
      throw py::value_error(name + ": got strides " +
                            std::string(py::str(py::object(array.attr("strides")))) +
                            ", expected a C-contiguous, aligned array");
    }
    tensors[name] = {array.data(), dtype_of(array),
                     std::vector<int64_t>(array.shape(), array.shape() + array.ndim())};
  }
  return tensors;
}

Activation activation_from(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  throw py::value_error("activation: got '" + name + "', expected gelu, gelu_tanh, relu or silu");
}

EngineConfig config_from(const py::dict& config) {
  static constexpr const char* kNames[] = {"head_dim", "layer_norm_eps", "activation", "layers"};
  for (const char* name : kNames) {
    if (!config.contains(name)) throw py::value_error(std::string(name) + ": missing in config");
  }
  if (config.size() != std::size(kNames)) {
    throw py::value_error("config: got " + std::string(py::str(config)) +
                          ", expected head_dim, layer_norm_eps, activation and layers only");
  }
  const auto get = [&](const char* name, auto type) {
    try {
      return config[name].cast<decltype(type)>();
    } catch (const py::cast_error&) {
      throw py::value_error(std::string(name) + ": got " + std::string(py::repr(config[name])) +
                            ", which has another type");
    }
  };
  return {get("head_dim", int64_t{}), get("layer_norm_eps", double{}),
          activation_from(get("activation", std::string{})), get("layers", std::vector<int64_t>{})};
}

/// An engine, and the tables that it reads in place.
struct BoundEngine {
  BoundEngine(const py::dict& config, const py::dict& arrays)
      : engine(config_from(config), tensors_from(arrays)) {
    for (const char* name : {"embeddings.word", "embeddings.position", "embeddings.token_type"}) {
      if (arrays.contains(name)) tables.append(arrays[name]);
    }
  }

  void run(const py::object& input_ids, const py::object& position_ids,
           const py::object& token_type_ids, const py::object& cu_seqlens, const py::object& out,
           const py::object& hidden_states, const py::object& word_rows, int num_threads) {
    if (input_ids.is_none() == word_rows.is_none()) {
      throw py::value_error("input_ids, word_rows: got " +
                            std::string(input_ids.is_none() ? "none" : "both") +
                            ", expected one of them");
    }
    if (num_threads < 1) {
      throw py::value_error("num_threads: got " + std::to_string(num_threads) +
                            ", expected 1 or more");
    }
    Batch batch{};
    batch.position_ids = given_elements<const int64_t>("position_ids", position_ids, {-1});
    const int64_t tokens = py::len(position_ids), hidden = engine.hidden_size();
    batch.num_tokens = batch.hidden_tokens = tokens;
    batch.input_ids = elements<const int64_t>("input_ids", input_ids, {tokens});
    batch.token_type_ids = elements<const int64_t>("token_type_ids", token_type_ids, {tokens});
    batch.word_rows =
        elements<const float>("word_rows", word_rows, {tokens, engine.embedding_size()});
    batch.cu_seqlens = given_elements<const int32_t>("cu_seqlens", cu_seqlens, {-1});
    batch.num_sequences = static_cast<int64_t>(py::len(cu_seqlens)) - 1;
    if (batch.num_sequences < 0) {
      throw py::value_error("cu_seqlens: got no elements, expected one more than sequences");
    }
    batch.out = given_elements<float>("out", out, {tokens, hidden});
    batch.hidden_states =
        elements<float>("hidden_states", hidden_states, {engine.num_layers() + 1, tokens, hidden});
    const py::gil_scoped_release release;
    engine.run(batch, num_threads);
  }

  Engine engine;
  py::list tables;
};

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<BoundEngine>(m, "Engine",
                          "A whole encoder; names of tensors and shapes: csrc/cpu/engine_model.h.")
      .def(py::init<const py::dict&, const py::dict&>(), py::arg("config"), py::arg("tensors"))
      .def(
          "run", &BoundEngine::run, py::arg("input_ids"), py::arg("position_ids"),
          py::arg("token_type_ids"), py::arg("cu_seqlens"), py::arg("out"),
          py::arg("hidden_states"), py::arg("word_rows"), py::arg("num_threads"),
          "Packed tokens to hidden states. input_ids, position_ids (T) int64; token_type_ids (T) "
          "int64 or None: the first row of the table; cu_seqlens (B + 1) int32; out (T, H) float32 "
          "is written, and hidden_states (L + 1, T, H) float32 unless it is None; word_rows (T, E) "
          "float32 instead of input_ids = None. The GIL is free meanwhile. ValueError: an array is "
          "not as said, an id is outside its table.")
      .def_property_readonly("isa", [](const BoundEngine& self) { return self.engine.isa(); })
      .def_property_readonly("packed_bytes",
                             [](const BoundEngine& self) { return self.engine.packed_bytes(); })
      .def_property_readonly("hidden_size",
                             [](const BoundEngine& self) { return self.engine.hidden_size(); })
      .def_property_readonly("num_layers",
                             [](const BoundEngine& self) { return self.engine.num_layers(); });
}
