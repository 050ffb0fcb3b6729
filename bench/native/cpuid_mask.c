/* Shows one process, not its children, an older x86 CPU than it runs on: preloaded
 * (LD_PRELOAD), it makes the kernel trap every CPUID instruction (arch_prctl ARCH_CPUID, Linux on
 * CPUs with the flag cpuid_fault) and answers each with the real result less the features that
 * CPUID_MASK leaves out. So engines that choose kernels by CPUID alone can be compared on one
 * instruction set, whether or not they have a switch of their own.
 *
 * CPUID_MASK: avx512_vnni, avx512, avx2_vnni or avx2, the best that is left. It exits with 71 for
 * another value and 72 where the kernel refuses.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID 0x1012

#define BIT(n) (1u << (n))

/* Leaf 7, subleaf 0: what belongs to AVX-512, with VNNI (ECX 11) apart; and AMX. */
#define AVX512_EBX (BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31))
#define AVX512_ECX (BIT(1) | BIT(6) | BIT(12) | BIT(14))
#define AVX512_VNNI_ECX BIT(11)
#define AVX512_EDX (BIT(2) | BIT(3) | BIT(8) | BIT(23))
#define AMX_EDX (BIT(22) | BIT(24) | BIT(25))
/* Leaf 7, subleaf 1. */
#define AVX_VNNI_EAX BIT(4)
#define AVX512_BF16_EAX BIT(5)
#define AMX_FP16_EAX BIT(21)
#define AVX_VNNI_LATER_EDX (BIT(4) | BIT(5) | BIT(10)) /* AVX-VNNI-INT8, AVX-NE-CONVERT, -INT16 */
#define AMX_COMPLEX_EDX BIT(8)
#define AVX10_EDX BIT(19)

enum Level { kAvx2 = 1, kAvx2Vnni, kAvx512, kAvx512Vnni };

static enum Level level;

static void mask(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) {
  uint32_t *eax = &r[0], *ebx = &r[1], *ecx = &r[2], *edx = &r[3];
  if (leaf != 7) return;
  if (subleaf == 0) {
    *edx &= ~AMX_EDX;
    if (level < kAvx512Vnni) *ecx &= ~AVX512_VNNI_ECX;
    if (level < kAvx512) {
      *ebx &= ~AVX512_EBX;
      *ecx &= ~AVX512_ECX;
      *edx &= ~AVX512_EDX;
    }
  } else if (subleaf == 1) {
    *eax &= ~AMX_FP16_EAX;
    *edx &= ~AMX_COMPLEX_EDX;
    if (level < kAvx512Vnni) *eax &= ~AVX512_BF16_EAX;
    if (level < kAvx512) *edx &= ~AVX10_EDX;
    if (level == kAvx512 || level == kAvx2) {
      *eax &= ~AVX_VNNI_EAX;
      *edx &= ~AVX_VNNI_LATER_EDX;
    }
  }
}

/* allowed: CPUID runs on this thread; otherwise it raises SIGSEGV. */
static long allow_cpuid(long allowed) { return syscall(SYS_arch_prctl, ARCH_CPUID, allowed); }

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)registers[REG_RIP];
  if (code[0] != 0x0F || code[1] != 0xA2) { /* not CPUID: a fault of the program's own */
    signal(signal_number, SIG_DFL);
    return;
  }
  const uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
  uint32_t r[4];
  allow_cpuid(1);
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  allow_cpuid(0);
  mask(leaf, subleaf, r);
  registers[REG_RAX] = r[0];
  registers[REG_RBX] = r[1];
  registers[REG_RCX] = r[2];
  registers[REG_RDX] = r[3];
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
  static const char* const kNames[] = {"", "avx2", "avx2_vnni", "avx512", "avx512_vnni"};
  const char* name = getenv("CPUID_MASK");
  if (name == NULL) _exit(71);
  for (int i = 1; i <= kAvx512Vnni; ++i) {
    if (strcmp(name, kNames[i]) == 0) level = (enum Level)i;
  }
  if (level == 0) _exit(71);
  /* Not for children: compilers catch SIGSEGV themselves. */
  unsetenv("LD_PRELOAD");
  unsetenv("CPUID_MASK");
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSEGV, &action, NULL) != 0 || allow_cpuid(0) != 0) _exit(72);
}
