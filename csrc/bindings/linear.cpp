// fastbert._cpu.Linear and quantize_rows: one Linear of the inference engine by itself, for heads
// and for tests of the kernels.
#include "../cpu/linear.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../cpu/aligned_buffer.h"
#include "../cpu/bfloat16.h"
#include "../cpu/parallel.h"
#include "arrays.h"

namespace py = pybind11;

namespace {

using fastbert::Activation;
using fastbert::AlignedBuffer;
using fastbert::kColumnBlock;
using fastbert::LinearInput;
using fastbert::LinearTable;
using fastbert::PackedLinear;
using fastbert::Scratch;
using fastbert::Weights;
using fastbert::bindings::elements;
using fastbert::bindings::given_elements;

Activation activation_from(const std::string& name) {
  static constexpr std::pair<const char*, Activation> kNames[] = {
      {"none", Activation::kNone},          {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh}, {"relu", Activation::kRelu},
      {"silu", Activation::kSilu},          {"tanh", Activation::kTanh}};
  for (const auto& [known, activation] : kNames) {
    if (name == known) return activation;
  }
  throw py::value_error("activation: got '" + name +
                        "', expected none, gelu, gelu_tanh, relu, silu or tanh");
}

void check_threads(int num_threads) {
  if (num_threads < 1) {
    throw py::value_error("num_threads: got " + std::to_string(num_threads) +
                          ", expected 1 or more");
  }
}

/// act(x · Wᵀ + bias), packed for the ISA that is in use when it is made.
class Linear {
 public:
  Linear(const py::array& weight, const py::object& weight_scale, const py::object& bias,
         const py::object& input_scale, const std::string& activation)
      : kernels_(fastbert::linear_kernels()), activation_(activation_from(activation)) {
    if (weight.ndim() != 2) {
      throw py::value_error("weight: got " + std::to_string(weight.ndim()) +
                            " dimensions, expected (out, in)");
    }
    out_ = weight.shape(0);
    in_ = weight.shape(1);
    const std::string dtype = py::str(weight.dtype());
    const std::vector<int64_t> shape = {out_, in_};
    const void* source;
    std::vector<uint16_t> rounded;
    if (dtype == "int8") {
      kind_ = Weights::kInt8;
      source = elements<const int8_t>("weight", weight, shape);
    } else if (dtype == "float32") {
      kind_ = Weights::kBFloat16;
      const float* values = elements<const float>("weight", weight, shape);
      rounded.resize(out_ * in_);
      std::transform(values, values + out_ * in_, rounded.begin(), fastbert::to_bfloat16);
      source = rounded.data();
    } else {
      kind_ = Weights::kBFloat16;
      source = elements<const uint16_t>("weight", weight, shape);
    }
    const bool int8 = kind_ == Weights::kInt8;
    if (int8 == weight_scale.is_none() || (!int8 && !input_scale.is_none())) {
      throw py::value_error(int8 ? "weight_scale: got None, expected one scale a row of weight"
                                 : "weight_scale, input_scale: got scales, expected None with " +
                                       dtype + " weights");
    }
    if (const float* scale = elements<const float>("input_scale", input_scale, {1})) {
      if (!(*scale > 0 && std::isfinite(*scale))) {
        throw py::value_error("input_scale: got " + std::to_string(*scale) +
                              ", expected a positive finite number");
      }
      input_scale_ = *scale;
    }
    scale_ = padded(elements<const float>("weight_scale", weight_scale, {out_}));
    column_sum_ = padded(nullptr);
    if (int8) {
      fastbert::sum_columns(static_cast<const int8_t*>(source), scale_.data(), in_, out_,
                            column_sum_.data());
    }
    bias_ = padded(elements<const float>("bias", bias, {out_}));
    weights_ = AlignedBuffer(kernels_.packed_bytes(kind_, in_, out_));
    kernels_.pack(kind_, source, in_, out_, weights_.data());
  }

  /// `residual` (like out) is added after the activation; `columns` (first, last) are what is
  /// written.
  void run(const py::object& x_array, const py::object& out_array, int num_threads,
           const py::object& residual_array, const py::object& columns) const {
    const float* x = given_elements<const float>("x", x_array, {-1, in_});
    const int64_t rows = py::len(x_array);
    float* y = given_elements<float>("out", out_array, {rows, out_});
    const float* residual = elements<const float>("residual", residual_array, {rows, out_});
    check_threads(num_threads);
    const auto [first, last] = columns.is_none() ? std::pair<int64_t, int64_t>(0, out_)
                                                 : columns.cast<std::pair<int64_t, int64_t>>();
    if (first < 0 || first % kColumnBlock != 0 || last < first || last > out_ ||
        (last % kColumnBlock != 0 && last != out_)) {
      throw py::value_error("columns: got (" + std::to_string(first) + ", " + std::to_string(last) +
                            "), expected multiples of " + std::to_string(kColumnBlock) + " up to " +
                            std::to_string(out_) + ", or that");
    }
    const py::gil_scoped_release release;
    const int64_t stride = kind_ == Weights::kInt8 ? kernels_.quantized_stride(in_) : 0;
    int8_t* quantized = fastbert::thread_scratch<int8_t>(Scratch::kShared, rows * stride);
    float* scale = fastbert::thread_scratch<float>(Scratch::kRows, 2 * rows);
    float* offset = scale + rows;
    if (kind_ == Weights::kInt8) {
      fastbert::parallel_for(rows, kRowGrain, num_threads, [=](int64_t begin, int64_t end) {
        kernels_.quantize_rows(x + begin * in_, end - begin, in_, input_scale_,
                               quantized + begin * stride, scale + begin, offset + begin);
      });
    }
    const PackedLinear packed = {
        kind_, in_, out_, weights_.data(), scale_.data(), column_sum_.data(), bias_.data()};
    const int64_t row_pieces = (rows + kRowGrain - 1) / kRowGrain;
    const int64_t column_pieces = (last - first + kColumnGrain - 1) / kColumnGrain;
    const auto run_piece = [=, first = first, last = last](int64_t piece) {
      const int64_t row = piece % row_pieces * kRowGrain;
      const int64_t column = first + piece / row_pieces * kColumnGrain;
      LinearInput input = {nullptr, nullptr, nullptr, x + row * in_};
      if (kind_ == Weights::kInt8) {
        input = {quantized + row * stride, scale + row, offset + row, nullptr};
      }
      kernels_.run(packed, input, std::min(kRowGrain, rows - row), column,
                   std::min(column + kColumnGrain, last), activation_,
                   residual == nullptr ? nullptr : residual + row * out_, y + row * out_, out_,
                   fastbert::Upcoming{nullptr, 0});
    };
    fastbert::parallel_for(row_pieces * column_pieces, 1, num_threads,
                           [&run_piece](int64_t begin, int64_t end) {
                             for (int64_t piece = begin; piece < end; ++piece) run_piece(piece);
                           });
  }

  int64_t out_features() const { return out_; }
  const char* isa() const { return kernels_.name; }
  size_t packed_bytes() const { return kernels_.packed_bytes(kind_, in_, out_); }

 private:
  static constexpr int64_t kRowGrain = 128;
  static constexpr int64_t kColumnGrain = 4 * kColumnBlock;

  /// One value a column, and zeros up to whole column blocks; nullptr: zeros only.
  std::vector<float> padded(const float* values) const {
    std::vector<float> result((out_ + kColumnBlock - 1) / kColumnBlock * kColumnBlock);
    if (values != nullptr) std::copy(values, values + out_, result.begin());
    return result;
  }

  const LinearTable& kernels_;
  const Activation activation_;
  Weights kind_;
  int64_t in_, out_;
  float input_scale_ = 0;
  std::vector<float> scale_, column_sum_, bias_;
  AlignedBuffer weights_;
};

void quantize_rows(const py::object& x_array, const py::object& out_array,
                   const py::object& scales_array, const py::object& offsets_array,
                   int num_threads) {
  const float* x = given_elements<const float>("x", x_array, {-1, -1});
  const int64_t rows = py::len(x_array);
  const int64_t cols = x_array.cast<py::array>().shape(1);
  int8_t* out = given_elements<int8_t>("out", out_array, {rows, cols});
  float* scales = given_elements<float>("scales", scales_array, {rows});
  float* offsets = given_elements<float>("offsets", offsets_array, {rows});
  check_threads(num_threads);
  const py::gil_scoped_release release;
  const LinearTable& kernels = fastbert::linear_kernels();
  const int64_t stride = kernels.quantized_stride(cols);
  fastbert::parallel_for(rows, 1, num_threads, [=, &kernels](int64_t first, int64_t last) {
    int8_t* padded = fastbert::thread_scratch<int8_t>(Scratch::kRow, stride);
    for (int64_t row = first; row < last; ++row) {
      kernels.quantize_rows(x + row * cols, 1, cols, 0, padded, scales + row, offsets + row);
      std::copy(padded, padded + cols, out + row * cols);
    }
  });
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Linear>(m, "Linear",
                     "act(x Wᵀ + bias): weight (out, in) int8 with weight_scale (out), or uint16 "
                     "(bf16) or float32 (rounded to bf16) without; input_scale (1): fixed.")
      .def(py::init<const py::array&, const py::object&, const py::object&, const py::object&,
                    const std::string&>(),
           py::arg("weight"), py::arg("weight_scale"), py::arg("bias"), py::arg("input_scale"),
           py::arg("activation"))
      .def("run", &Linear::run, py::arg("x"), py::arg("out"), py::arg("num_threads"),
           py::arg("residual") = py::none(), py::arg("columns") = py::none())
      .def_property_readonly("out_features", &Linear::out_features)
      .def_property_readonly("isa", &Linear::isa)
      .def_property_readonly("packed_bytes", &Linear::packed_bytes);
  m.def("quantize_rows", &quantize_rows, py::arg("x"), py::arg("out"), py::arg("scales"),
        py::arg("offsets"), py::arg("num_threads"));
}
