#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace fastbert {

#if defined(__x86_64__)
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
#endif
namespace portable {
const KernelTable& kernel_table();
}

namespace {

struct Unit {
  const char* name;
  const KernelTable* table;
};

std::vector<Unit> find_units() {
  std::vector<Unit> units;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c, which the units are compiled for too, came before AVX2 in every processor line.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) units.push_back({"avx512", &avx512::kernel_table()});
  if (avx2) units.push_back({"avx2", &avx2::kernel_table()});
#endif
  units.push_back({"portable", &portable::kernel_table()});
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

const KernelTable& kernels() { return *current_unit().table; }

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
