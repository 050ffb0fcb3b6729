#include "linear.h"

#define FASTBERT_ISA linear_avx2_vnni
#if defined(__AVXVNNI__)
#define FASTBERT_VECTOR_BYTES 32
#include "linear_bf16.h"
#include "linear_run.h"
#include "linear_vnni.h"
#endif

namespace fastbert::FASTBERT_ISA {

const LinearTable* linear_table() {
#if defined(__AVXVNNI__)
  return LinearUnit<VnniKernel, BFloat16Kernel>::table("avx2_vnni");
#else
  return nullptr;  // compiled without the flags: setup.py leaves out those that a compiler lacks
#endif
}

}  // namespace fastbert::FASTBERT_ISA
