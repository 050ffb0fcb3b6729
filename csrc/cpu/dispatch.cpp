#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "linear.h"

namespace fastbert {

#if defined(__x86_64__)
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
// nullptr where the compiler did not know the instructions.
namespace linear_amx {
const LinearTable* linear_table();
}
namespace linear_avx512_vnni {
const LinearTable* linear_table();
}
namespace linear_avx512 {
const LinearTable* linear_table();
}
namespace linear_avx2_vnni {
const LinearTable* linear_table();
}
namespace linear_avx2 {
const LinearTable* linear_table();
}
#endif
namespace portable {
const KernelTable& kernel_table();
}
namespace linear_portable {
const LinearTable* linear_table();
}

namespace {

struct Unit {
  const char* name;
  const KernelTable* kernels;
  const LinearTable* linear;
};

#if defined(__x86_64__)
/// Features that older compilers have no name for, by leaf 7 of CPUID. The registers of all but AMX
/// are those of AVX2 and AVX-512, which __builtin_cpu_supports() answers for.
struct Features {
  bool avx512_vnni, avx512_bf16, avx_vnni, amx;
};

Features read_features() {
  Features features = {};
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const auto has = [](unsigned word, int bit) { return (word >> bit & 1) != 0; };
  features.avx512_vnni = has(c, 11);
  features.amx = has(d, 24) && has(d, 25) && has(d, 22);  // tiles, int8, bf16
  const unsigned sub_leaves = a;
  if (sub_leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    features.avx_vnni = has(a, 4);
    features.avx512_bf16 = has(a, 5);
  }
  return features;
}

/// Linux hands out tile registers, whose 8 KB every context switch then saves, to who asks. What it
/// grants is the process's, with the threads to come.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Unit> find_units() {
  std::vector<Unit> units;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c, which the units are compiled for too, came before AVX2 in every processor line.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const Features features = read_features();
  const auto add = [&units](const char* name, const KernelTable& kernels,
                            const LinearTable* linear) {
    if (linear != nullptr) units.push_back({name, &kernels, linear});
  };
  if (avx512) {
    const KernelTable& kernels = avx512::kernel_table();
    const LinearTable* const amx = linear_amx::linear_table();
    if (amx != nullptr && features.amx && features.avx512_bf16 && request_tiles()) {
      add("amx", kernels, amx);
    }
    if (features.avx512_vnni) add("avx512_vnni", kernels, linear_avx512_vnni::linear_table());
    add("avx512", kernels, linear_avx512::linear_table());
  }
  if (avx2) {
    const KernelTable& kernels = avx2::kernel_table();
    if (features.avx_vnni) add("avx2_vnni", kernels, linear_avx2_vnni::linear_table());
    add("avx2", kernels, linear_avx2::linear_table());
  }
#endif
  units.push_back({"portable", &portable::kernel_table(), linear_portable::linear_table()});
  return units;
}

/// What this machine can run, best first.
const std::vector<Unit>& units() {
  static const std::vector<Unit> found = find_units();
  return found;
}

std::atomic<const Unit*> chosen{nullptr};

const Unit& current_unit() {
  const Unit* unit = chosen.load(std::memory_order_acquire);
  return unit != nullptr ? *unit : units().front();
}

}  // namespace

const KernelTable& kernels() { return *current_unit().kernels; }

const LinearTable& linear_kernels() { return *current_unit().linear; }

const char* isa() { return current_unit().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Unit& unit : units()) names.emplace_back(unit.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string available;
  for (const Unit& unit : units()) {
    if (name == unit.name) {
      chosen.store(&unit, std::memory_order_release);
      return;
    }
    available += (available.empty() ? "" : ", ") + std::string(unit.name);
  }
  throw std::invalid_argument("isa = '" + name +
                              "' is not available here; this machine has: " + available);
}

}  // namespace fastbert
