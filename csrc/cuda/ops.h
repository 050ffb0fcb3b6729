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

}  // namespace fastbert::cuda
