#if defined(__x86_64__)
#if !defined(__AVX2__)
#error "compile this file with the flags of its ISA"
#endif
#define FASTBERT_ISA avx2
#define FASTBERT_VECTOR_BYTES 32
#include "isa_unit.h"
#endif
