// The Python module fastbert._cpu: the kernels of csrc/cpu, with addresses as integers (0 for an
// argument that is not given). Tensors are made and typed by fastbert/ops/_cpp.py, shapes are the ops';
// what holds ids or offsets is checked here, so that no value from Python becomes a wild address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/checks.h"
#include "../cpu/dispatch.h"
#include "../cpu/ops.h"

namespace py = pybind11;

void bind_engine(py::module_& m);  // engine.cpp
void bind_linear(py::module_& m);  // linear.cpp

namespace {

using fastbert::DType;
using fastbert::KernelTable;

/// How an argument of a kernel travels from Python.
template <class A>
struct Wire {
  using type = A;
  static A receive(A value) { return value; }
};
template <class P>
struct Wire<P*> {
  using type = uintptr_t;
  static P* receive(uintptr_t address) { return reinterpret_cast<P*>(address); }
};
template <>
struct Wire<uint64_t> {  // seeds, int64 in Python
  using type = int64_t;
  static uint64_t receive(int64_t seed) { return static_cast<uint64_t>(seed); }
};
template <>
struct Wire<DType> {
  using type = int;
  static DType receive(int code) { return static_cast<DType>(code); }
};

/// Binds the kernel in slot `op`; `check` sees its arguments first. The ISA is looked up at each
/// call, the GIL is free meanwhile.
template <class... Args, class Check>
void bind(py::module_& m, const char* name, void (*KernelTable::*op)(Args...), Check check) {
  m.def(
      name,
      [op, check](typename Wire<Args>::type... args) {
        check(Wire<Args>::receive(args)...);
        (fastbert::kernels().*op)(Wire<Args>::receive(args)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

constexpr auto kNoCheck = [](auto...) {};

void check_embedding_ids(const int64_t* input_ids, const int64_t* position_ids,
                         const int64_t* token_type_ids, int64_t rows, int64_t vocab,
                         int64_t positions, int64_t types) {
  fastbert::check_ids("input_ids", input_ids, rows, vocab);
  fastbert::check_ids("position_ids", position_ids, rows, positions);
  if (token_type_ids != nullptr) {
    fastbert::check_ids("token_type_ids", token_type_ids, rows, types);
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastbert. Signatures: csrc/cpu/ops.h.";
  m.def("isa", &fastbert::isa);
  m.def("available_isas", &fastbert::available_isas);
  m.def("set_isa", &fastbert::set_isa, py::arg("name"));

  bind(m, "attention_fwd", &KernelTable::attention_fwd,
       [](const void*, const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens,
          int64_t, int64_t, int64_t max_seqlen, auto...) {
         fastbert::check_cu_seqlens(cu_seqlens, num_sequences, num_tokens, max_seqlen);
       });
  bind(
      m, "attention_bwd", &KernelTable::attention_bwd,
      [](const void*, const void*, const void*, const void*, const int32_t* cu_seqlens,
         int64_t num_sequences, int64_t num_tokens, int64_t, int64_t, int64_t max_seqlen, auto...) {
        fastbert::check_cu_seqlens(cu_seqlens, num_sequences, num_tokens, max_seqlen);
      });
  bind(m, "bias_gelu_fwd", &KernelTable::bias_gelu_fwd, kNoCheck);
  bind(m, "bias_gelu_bwd", &KernelTable::bias_gelu_bwd, kNoCheck);
  bind(m, "add_layer_norm_fwd", &KernelTable::add_layer_norm_fwd, kNoCheck);
  bind(m, "add_layer_norm_bwd", &KernelTable::add_layer_norm_bwd, kNoCheck);
  bind(m, "embed_layer_norm_fwd", &KernelTable::embed_layer_norm_fwd,
       [](const int64_t* input_ids, const int64_t* position_ids, const int64_t* token_type_ids,
          const void*, const void*, const void*, const void*, const void*, int64_t rows, int64_t,
          int64_t vocab, int64_t positions, int64_t types, auto...) {
         check_embedding_ids(input_ids, position_ids, token_type_ids, rows, vocab, positions,
                             types);
       });
  bind(m, "embed_layer_norm_bwd", &KernelTable::embed_layer_norm_bwd,
       [](const void*, const int64_t* input_ids, const int64_t* position_ids,
          const int64_t* token_type_ids, const void*, const void*, const void*, const void*,
          const void*, const void*, int64_t rows, int64_t, int64_t vocab, int64_t positions,
          int64_t types, auto...) {
         check_embedding_ids(input_ids, position_ids, token_type_ids, rows, vocab, positions,
                             types);
       });
  bind(m, "cross_entropy_rows", &KernelTable::cross_entropy_rows,
       [](void*, int64_t, const void*, const int64_t* labels, int64_t rows, int64_t vocab,
          int64_t ignore_index,
          auto...) { fastbert::check_labels(labels, rows, vocab, ignore_index); });
  bind(m, "gather_rows", &KernelTable::gather_rows,
       [](const void*, const int64_t* index, int64_t count, int64_t num_rows, auto...) {
         fastbert::check_index(index, count, num_rows);
       });
  bind(m, "scatter_rows", &KernelTable::scatter_rows,
       [](const void*, const int64_t* index, int64_t count, int64_t num_rows, auto...) {
         fastbert::check_index(index, count, num_rows);
       });
  bind(m, "squared_norm", &KernelTable::squared_norm, kNoCheck);
  bind(m, "adamw_step", &KernelTable::adamw_step, kNoCheck);
  bind(m, "few_rows_product", &KernelTable::few_rows_product, kNoCheck);

  bind_engine(m);
  bind_linear(m);
}
