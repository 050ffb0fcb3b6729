// The CUDA kernels as plain host functions: raw device pointers, sizes, scalars, dtype codes, a
// stream.
//
// Every function only launches: it neither waits for the device nor allocates. Tensors are
// contiguous, `nullptr` stands for an absent one, sizes count elements. A dtype or argument that no
// kernel serves throws std::invalid_argument, a failed launch std::runtime_error with CUDA's text.
//
// Dropout (see philox.cuh): `dropout_seed` points to one int64 on the device, so that a captured
// graph draws fresh masks when the seed is rewritten; it may be null when dropout_p is 0.
#pragma once

#include <cstdint>

// As cuda_runtime_api.h declares it; repeated so that bindings compile without CUDA's headers.
typedef struct CUstream_st* cudaStream_t;

namespace fastbert::cuda {

/// Element type codes, as Python passes them (2, fp64, exists on the CPU only).
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 3 };

/// s_ij = scale · q_i · k_j; lse_i = log Σ_j exp s_ij; out_i = Σ_j dropout(exp(s_ij − lse_i)) v_j,
/// inside each sequence (Vaswani et al. 2017, eq. 1).
///
/// qkv (T, 3, N, D), out (T, N, D) of `dtype`; lse (N, T) fp32; cu_seqlens int32 (batch + 1) on the
/// device, max_seqlen at least the longest length.
void attention_fwd(const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t tokens, int64_t batch, int64_t heads, int64_t head_dim,
                   int64_t max_seqlen, double softmax_scale, double dropout_p,
                   const int64_t* dropout_seed, int64_t dropout_offset, int dtype,
                   cudaStream_t stream);

/// Whether the current device runs what is compiled for sm_90a: attention_fwd's kernel on Hopper's
/// own matrix instructions (head dimensions 64 and 128, 16 bits).
bool has_wgmma();

/// For tests and benchmarks, which compare the kernels: forbids or allows that kernel from now on,
/// in every thread, and returns what held before. Allowed at first.
bool allow_wgmma(bool allowed);

/// dqkv (T, 3, N, D) from dout (T, N, D), both of `dtype`, and what forward took and gave. With
/// p_ij = exp(s_ij − lse_i), delta_i = dout_i · out_i and ds_ij = p_ij (dropout'(dout_i · v_j) −
/// delta_i): dq_i = scale Σ_j ds_ij k_j, dk_j = scale Σ_i ds_ij q_i, dv_j = Σ_i dropout(p_ij) dout_i
/// (Dao 2023, section 2.3). `delta` (N, T) fp32 is workspace.
void attention_bwd(const void* dout, const void* qkv, const void* out, const float* lse,
                   const int32_t* cu_seqlens, void* dqkv, float* delta, int64_t tokens,
                   int64_t batch, int64_t heads, int64_t head_dim, int64_t max_seqlen,
                   double softmax_scale, double dropout_p, const int64_t* dropout_seed,
                   int64_t dropout_offset, int dtype, cudaStream_t stream);

/// y = gelu(x + bias) over (rows, cols), erf form or tanh form (Hendrycks and Gimpel 2016).
/// x, y of `dtype`; bias (cols) of `vector_dtype` or null.
void bias_gelu_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool tanh,
                   int dtype, int vector_dtype, cudaStream_t stream);

/// dx = dy · gelu'(x + bias), dbias = Σ_rows dx. `bias` and `dbias` are both null or both given;
/// `workspace` holds bias_gelu_bwd_workspace() floats.
void bias_gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                   float* workspace, int64_t rows, int64_t cols, bool tanh, int dtype,
                   int vector_dtype, cudaStream_t stream);
int64_t bias_gelu_bwd_workspace(int64_t rows, int64_t cols);

/// z = residual + dropout(x + x_bias), rounded to `dtype`; y = (z − mean) · rstd · weight + bias
/// over (rows, cols), with the mean and the two-pass variance of the rounded z in fp32 (Ba et al.
/// 2016). residual, x_bias may be null; z, mean, rstd are all null (nothing saved) or all given.
void add_layer_norm_fwd(const void* x, const void* residual, const void* x_bias, const void* weight,
                        const void* bias, void* y, void* z, float* mean, float* rstd, int64_t rows,
                        int64_t cols, double eps, double dropout_p, const int64_t* dropout_seed,
                        int64_t dropout_offset, int dtype, int vector_dtype, cudaStream_t stream);

/// dz, the gradient of residual; dx = dropout'(dz), null when dropout_p is 0 (then dz serves as
/// dx); dweight, dbias (cols), and dx_bias = Σ_rows dx, which may be null. `workspace` holds
/// add_layer_norm_bwd_workspace() floats.
void add_layer_norm_bwd(const void* dy, const void* z, const void* weight, const float* mean,
                        const float* rstd, void* dz, void* dx, void* dweight, void* dbias,
                        void* dx_bias, float* workspace, int64_t rows, int64_t cols,
                        double dropout_p, const int64_t* dropout_seed, int64_t dropout_offset,
                        int dtype, int vector_dtype, cudaStream_t stream);
int64_t add_layer_norm_bwd_workspace(int64_t rows, int64_t cols);

/// y = dropout((e − mean) · rstd · weight + bias) with e = word[input_ids] + position[position_ids]
/// + token_type[token_type_ids] (Devlin et al. 2018, figure 2), summed in fp32 and not rounded.
///
/// ids (tokens); tables (num_words | num_positions | num_token_types, cols) and y (tokens, cols) of
/// `dtype`; token_type and its ids are both null or both given. mean, rstd (tokens). An id outside
/// its table reads the nearest row.
void embed_layer_norm_fwd(const int64_t* input_ids, const int64_t* position_ids,
                          const int64_t* token_type_ids, const void* word, const void* position,
                          const void* token_type, const void* weight, const void* bias, void* y,
                          float* mean, float* rstd, int64_t tokens, int64_t cols, int64_t num_words,
                          int64_t num_positions, int64_t num_token_types, double eps,
                          double dropout_p, const int64_t* dropout_seed, int64_t dropout_offset,
                          int dtype, int vector_dtype, cudaStream_t stream);

/// de (tokens, cols) of `dtype`, the gradient of e, which is added up anew; dweight, dbias (cols).
/// `workspace` holds embed_layer_norm_bwd_workspace() floats.
void embed_layer_norm_bwd(const void* dy, const int64_t* input_ids, const int64_t* position_ids,
                          const int64_t* token_type_ids, const void* word, const void* position,
                          const void* token_type, const void* weight, const float* mean,
                          const float* rstd, void* de, void* dweight, void* dbias, float* workspace,
                          int64_t tokens, int64_t cols, int64_t num_words, int64_t num_positions,
                          int64_t num_token_types, double dropout_p, const int64_t* dropout_seed,
                          int64_t dropout_offset, int dtype, int vector_dtype, cudaStream_t stream);
int64_t embed_layer_norm_bwd_workspace(int64_t tokens, int64_t cols);

/// keys (2 or 3 tables, tokens) of `key_bytes`, 2 or 4: the row of each id were the tables laid end
/// to end; for one outside its table their number of rows, which must fit too.
void embedding_keys(const int64_t* input_ids, const int64_t* position_ids,
                    const int64_t* token_type_ids, void* keys, int64_t tokens, int64_t num_words,
                    int64_t num_positions, int64_t num_token_types, int key_bytes,
                    cudaStream_t stream);

/// Adds up de (tokens, cols) by the keys of embedding_keys(), which the caller has sorted: `keys`
/// (places) ascending and `order` (places), the index that each had before, equal ones in order.
///
/// dword, dposition, dtoken_type of `dtype`, each (its table's rows, cols) and all 0 on entry: rows
/// without a token are not written. `workspace` holds embedding_gradients_workspace() floats.
void embedding_gradients(const void* de, const void* keys, const int64_t* order, void* dword,
                         void* dposition, void* dtoken_type, float* workspace, int64_t places,
                         int64_t tokens, int64_t cols, int64_t num_words, int64_t num_positions,
                         int64_t num_token_types, int key_bytes, int dtype, cudaStream_t stream);
int64_t embedding_gradients_workspace(int64_t places, int64_t cols);

}  // namespace fastbert::cuda
