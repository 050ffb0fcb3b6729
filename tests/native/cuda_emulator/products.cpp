// When a warpgroup's products (wgmma) read their operands and show their sums. Hardware may do both
// at any time between the instruction and the wait; here operands are read at the wait, or at once
// when copies are eager, and until the wait the sums are NaN.
#include <cuda_runtime.h>

#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {
namespace {

constexpr int kSums = 32, kLeftRegisters = 4;

struct Product {
  float* sums;
  std::function<void(float*)> compute;  // null: done
};

struct Sums {
  float values[kSums];
  int products = 0;  // that are not waited for
};

struct Thread {
  std::vector<Product> open_group;
  std::deque<std::vector<Product>> groups;
  std::map<float*, Sums> in_flight;
  std::map<const uint32_t*, uint32_t> fenced;  // registers as the last wgmma.fence left them
};

std::vector<Thread> threads;

void require_fenced(const Thread& thread, const void* registers, int count) {
  const auto* words = static_cast<const uint32_t*>(registers);
  for (int i = 0; i < count; ++i) {
    const auto fenced = thread.fenced.find(words + i);
    if (fenced == thread.fenced.end() || std::memcmp(words + i, &fenced->second, 4) != 0) {
      throw std::runtime_error("wgmma: a register was written and no wgmma.fence followed");
    }
  }
}

}  // namespace

void forget_products(size_t count) { threads.assign(count, {}); }

bool has_products() {
  const Thread& thread = threads[thread_index()];
  return !thread.open_group.empty() || !thread.groups.empty();
}

void fence_registers(const void* registers, size_t bytes) {
  const auto* words = static_cast<const uint32_t*>(registers);
  for (size_t i = 0; i < bytes / 4; ++i) {
    std::memcpy(&threads[thread_index()].fenced[words + i], words + i, 4);
  }
}

void issue_product(const char* operation, float* sums, const uint32_t* left,
                   std::function<void(float*)> compute) {
  meet_warpgroup(operation);
  Thread& thread = threads[thread_index()];
  if (left != nullptr) require_fenced(thread, left, kLeftRegisters);
  if (thread.in_flight.count(sums) == 0) {
    require_fenced(thread, sums, kSums);
    std::memcpy(thread.in_flight[sums].values, sums, sizeof(Sums::values));
    std::memset(static_cast<void*>(sums), 0xff, sizeof(Sums::values));
  }
  Sums& in_flight = thread.in_flight[sums];
  ++in_flight.products;
  if (is_eager()) {
    compute(in_flight.values);
    compute = nullptr;
  }
  thread.open_group.push_back({sums, std::move(compute)});
}

void commit_products() {
  Thread& thread = threads[thread_index()];
  thread.groups.push_back(std::exchange(thread.open_group, {}));
}

void wait_for_products(int pending) {
  meet_warpgroup("wgmma.wait_group");
  Thread& thread = threads[thread_index()];
  while (thread.groups.size() > static_cast<size_t>(pending)) {
    for (const Product& product : thread.groups.front()) {
      Sums& sums = thread.in_flight[product.sums];
      if (product.compute) product.compute(sums.values);
      if (--sums.products > 0) continue;
      std::memcpy(product.sums, sums.values, sizeof(sums.values));
      thread.in_flight.erase(product.sums);
      for (int i = 0; i < kSums; ++i) {
        thread.fenced.erase(reinterpret_cast<const uint32_t*>(product.sums) + i);
      }
    }
    thread.groups.pop_front();
  }
  // Other lanes' products read this one's registers: none goes on before all are computed.
  meet_warpgroup("wgmma.wait_group, done");
}

}  // namespace emulator
