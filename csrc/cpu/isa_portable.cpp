// 16-byte vectors: SSE2 on x86-64, NEON on AArch64, whatever the compiler makes of them elsewhere.
#define FASTBERT_ISA portable
#define FASTBERT_VECTOR_BYTES 16
#include "isa_unit.h"
