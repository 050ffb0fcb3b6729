// fastbert._cuda: the functions of csrc/cuda/ops.h. Pointers and the stream come as integer
// addresses, 0 for an absent tensor. Importing the module touches no device and needs no driver.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ops.h"

namespace py = pybind11;
using py::arg;

namespace {

template <typename T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T>
T to_native(FromPython<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

/// `function` with its pointers as integers.
template <typename Result, typename... Arguments>
auto by_address(Result (*function)(Arguments...)) {
  return [function](FromPython<Arguments>... arguments) {
    return function(to_native<Arguments>(arguments)...);
  };
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  namespace cuda = fastbert::cuda;
  // A launch waits when the stream's queue is full: other Python threads may go on meanwhile.
  const py::call_guard<py::gil_scoped_release> release;

  module.doc() =
      "CUDA kernels on raw addresses; fastbert.ops._cuda_launch calls them with tensors.";
  module.def("attention_fwd", by_address(cuda::attention_fwd), release, arg("qkv"),
             arg("cu_seqlens"), arg("out"), arg("lse"), arg("tokens"), arg("batch"), arg("heads"),
             arg("head_dim"), arg("max_seqlen"), arg("softmax_scale"), arg("dropout_p"),
             arg("dropout_seed"), arg("dropout_offset"), arg("dtype"), arg("stream"));
  module.def("has_wgmma", cuda::has_wgmma);
  module.def("allow_wgmma", cuda::allow_wgmma, arg("allowed"));
  module.def("attention_bwd", by_address(cuda::attention_bwd), release, arg("dout"), arg("qkv"),
             arg("out"), arg("lse"), arg("cu_seqlens"), arg("dqkv"), arg("delta"), arg("tokens"),
             arg("batch"), arg("heads"), arg("head_dim"), arg("max_seqlen"), arg("softmax_scale"),
             arg("dropout_p"), arg("dropout_seed"), arg("dropout_offset"), arg("dtype"),
             arg("stream"));
  module.def("bias_gelu_fwd", by_address(cuda::bias_gelu_fwd), release, arg("x"), arg("bias"),
             arg("y"), arg("rows"), arg("cols"), arg("tanh"), arg("dtype"), arg("vector_dtype"),
             arg("stream"));
  module.def("bias_gelu_bwd", by_address(cuda::bias_gelu_bwd), release, arg("dy"), arg("x"),
             arg("bias"), arg("dx"), arg("dbias"), arg("workspace"), arg("rows"), arg("cols"),
             arg("tanh"), arg("dtype"), arg("vector_dtype"), arg("stream"));
  module.def("bias_gelu_bwd_workspace", cuda::bias_gelu_bwd_workspace, arg("rows"), arg("cols"));
  module.def("add_layer_norm_fwd", by_address(cuda::add_layer_norm_fwd), release, arg("x"),
             arg("residual"), arg("x_bias"), arg("weight"), arg("bias"), arg("y"), arg("z"),
             arg("mean"), arg("rstd"), arg("rows"), arg("cols"), arg("eps"), arg("dropout_p"),
             arg("dropout_seed"), arg("dropout_offset"), arg("dtype"), arg("vector_dtype"),
             arg("stream"));
  module.def("add_layer_norm_bwd", by_address(cuda::add_layer_norm_bwd), release, arg("dy"),
             arg("z"), arg("weight"), arg("mean"), arg("rstd"), arg("dz"), arg("dx"),
             arg("dweight"), arg("dbias"), arg("dx_bias"), arg("workspace"), arg("rows"),
             arg("cols"), arg("dropout_p"), arg("dropout_seed"), arg("dropout_offset"),
             arg("dtype"), arg("vector_dtype"), arg("stream"));
  module.def("add_layer_norm_bwd_workspace", cuda::add_layer_norm_bwd_workspace, arg("rows"),
             arg("cols"));
  module.def("embed_layer_norm_fwd", by_address(cuda::embed_layer_norm_fwd), release,
             arg("input_ids"), arg("position_ids"), arg("token_type_ids"), arg("word"),
             arg("position"), arg("token_type"), arg("weight"), arg("bias"), arg("y"), arg("mean"),
             arg("rstd"), arg("tokens"), arg("cols"), arg("num_words"), arg("num_positions"),
             arg("num_token_types"), arg("eps"), arg("dropout_p"), arg("dropout_seed"),
             arg("dropout_offset"), arg("dtype"), arg("vector_dtype"), arg("stream"));
  module.def("embed_layer_norm_bwd", by_address(cuda::embed_layer_norm_bwd), release, arg("dy"),
             arg("input_ids"), arg("position_ids"), arg("token_type_ids"), arg("word"),
             arg("position"), arg("token_type"), arg("weight"), arg("mean"), arg("rstd"), arg("de"),
             arg("dweight"), arg("dbias"), arg("workspace"), arg("tokens"), arg("cols"),
             arg("num_words"), arg("num_positions"), arg("num_token_types"), arg("dropout_p"),
             arg("dropout_seed"), arg("dropout_offset"), arg("dtype"), arg("vector_dtype"),
             arg("stream"));
  module.def("embed_layer_norm_bwd_workspace", cuda::embed_layer_norm_bwd_workspace, arg("tokens"),
             arg("cols"));
  module.def("embedding_keys", by_address(cuda::embedding_keys), release, arg("input_ids"),
             arg("position_ids"), arg("token_type_ids"), arg("keys"), arg("tokens"),
             arg("num_words"), arg("num_positions"), arg("num_token_types"), arg("key_bytes"),
             arg("stream"));
  module.def("embedding_gradients", by_address(cuda::embedding_gradients), release, arg("de"),
             arg("keys"), arg("order"), arg("dword"), arg("dposition"), arg("dtoken_type"),
             arg("workspace"), arg("places"), arg("tokens"), arg("cols"), arg("num_words"),
             arg("num_positions"), arg("num_token_types"), arg("key_bytes"), arg("dtype"),
             arg("stream"));
  module.def("embedding_gradients_workspace", cuda::embedding_gradients_workspace, arg("places"),
             arg("cols"));
}
