// The functions of ops.h for ctypes: C symbols that hold function pointers, whose calls return null
// or the text of the exception.
#include <exception>
#include <string>

#include "ops.h"

namespace {

template <auto kFunction>
struct Export;

template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Export<kFunction> {
  static const char* call(Arguments... arguments) {
    static std::string error;
    try {
      kFunction(arguments...);
      return nullptr;
    } catch (const std::exception& exception) {
      error = exception.what();
      return error.c_str();
    }
  }
};

}  // namespace

extern "C" {
auto* attention_fwd = &Export<fastbert::cuda::attention_fwd>::call;
auto* attention_bwd = &Export<fastbert::cuda::attention_bwd>::call;
auto* bias_gelu_fwd = &Export<fastbert::cuda::bias_gelu_fwd>::call;
auto* bias_gelu_bwd = &Export<fastbert::cuda::bias_gelu_bwd>::call;
auto* add_layer_norm_fwd = &Export<fastbert::cuda::add_layer_norm_fwd>::call;
auto* add_layer_norm_bwd = &Export<fastbert::cuda::add_layer_norm_bwd>::call;
auto* embed_layer_norm_fwd = &Export<fastbert::cuda::embed_layer_norm_fwd>::call;
auto* embed_layer_norm_bwd = &Export<fastbert::cuda::embed_layer_norm_bwd>::call;
auto* embedding_keys = &Export<fastbert::cuda::embedding_keys>::call;
auto* embedding_gradients = &Export<fastbert::cuda::embedding_gradients>::call;
// These cannot fail.
auto* bias_gelu_bwd_workspace = &fastbert::cuda::bias_gelu_bwd_workspace;
auto* has_wgmma = &fastbert::cuda::has_wgmma;
auto* allow_wgmma = &fastbert::cuda::allow_wgmma;
auto* add_layer_norm_bwd_workspace = &fastbert::cuda::add_layer_norm_bwd_workspace;
auto* embed_layer_norm_bwd_workspace = &fastbert::cuda::embed_layer_norm_bwd_workspace;
auto* embedding_gradients_workspace = &fastbert::cuda::embedding_gradients_workspace;
}
