#include "linear.h"

#define FASTBERT_ISA linear_portable
#define FASTBERT_VECTOR_BYTES 16
#include "linear_bf16.h"
#include "linear_run.h"
#include "linear_widened.h"

namespace fastbert::FASTBERT_ISA {

const LinearTable* linear_table() {
  return LinearUnit<WidenedKernel, BFloat16Kernel>::table("portable");
}

}  // namespace fastbert::FASTBERT_ISA
