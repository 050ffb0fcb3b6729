#include "linear.h"

#define FASTBERT_ISA linear_avx512_vnni
#if defined(__AVX512VNNI__)
#define FASTBERT_VECTOR_BYTES 64
#include "linear_bf16.h"
#include "linear_run.h"
#include "linear_vnni.h"
#endif

namespace fastbert::FASTBERT_ISA {

const LinearTable* linear_table() {
#if defined(__AVX512VNNI__)
  return LinearUnit<VnniKernel, BFloat16Kernel>::table("avx512_vnni");
#else
  return nullptr;  // compiled without the flags: setup.py leaves out those that a compiler lacks
#endif
}

}  // namespace fastbert::FASTBERT_ISA
