#include "linear.h"

#define FASTBERT_ISA linear_avx2
#if defined(__AVX2__)
#define FASTBERT_VECTOR_BYTES 32
#include "linear_bf16.h"
#include "linear_pairs.h"
#include "linear_run.h"
#endif

namespace fastbert::FASTBERT_ISA {

const LinearTable* linear_table() {
#if defined(__AVX2__)
  return LinearUnit<PairsKernel, BFloat16Kernel>::table("avx2");
#else
  return nullptr;  // compiled without the flags: setup.py leaves out those that a compiler lacks
#endif
}

}  // namespace fastbert::FASTBERT_ISA
