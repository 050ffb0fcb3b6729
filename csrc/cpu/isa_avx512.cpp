#if defined(__x86_64__)
#if !defined(__AVX512DQ__)
#error "compile this file with the flags of its ISA"
#endif
#define FASTBERT_ISA avx512
#define FASTBERT_VECTOR_BYTES 64
#include "isa_unit.h"
#endif
