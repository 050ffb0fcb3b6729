#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr size_t kSlotBytes = 64;
constexpr size_t kStackBytes = 64 * 1024;

/// How a run may differ and a correct kernel not: set by tests through emulator_configure().
bool reverse_order = false;  // the order in which threads run between two meetings
bool eager_copies = false;   // cp.async and wgmma happen at once, not as late as the wait allows
int shared_bytes_on_offer = 227 * 1024;  // what a block may have, says the device

enum class State { kReady, kAtWarp, kAtWarpgroup, kAtBlock, kDone };

struct Copy {
  uint32_t shared;
  const void* global;
  size_t bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 index;
  int thread, warp, lane;
  State state;
  const char* operation;  // where it waits
  int parity;             // slots alternate, so that a fast lane never overwrites unread data
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  // Where its copies went, and their bytes, since its last fence.proxy.async.
  std::vector<std::pair<uint32_t, size_t>> unpublished;
};

struct Warp {
  alignas(16) unsigned char slots[2][kWarpSize * kSlotBytes];
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared_storage, shared_of_async_proxy;
unsigned char* shared = nullptr;
size_t shared_size = 0;
Fiber* running = nullptr;
const std::function<void()>* kernel = nullptr;
std::exception_ptr failure;

void fiber_main() {
  try {
    (*kernel)();
    if (has_products()) throw std::runtime_error("a thread ends with wgmma in flight");
  } catch (...) {
    failure = std::current_exception();
  }
  running->state = State::kDone;
  swapcontext(&running->context, &scheduler);
}

void wait_as(State state, const char* operation) {
  Fiber* self = running;
  self->state = state;
  self->operation = operation;
  swapcontext(&self->context, &scheduler);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  swapcontext(&scheduler, &fiber.context);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

/// Frees the fibers [begin, end) when all that still run wait in `state`, at the same operation.
bool release(size_t begin, size_t end, State state) {
  const char* operation = nullptr;
  for (size_t i = begin; i < end; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kDone) continue;
    if (fiber.state != state) return false;
    if (operation != nullptr && std::strcmp(operation, fiber.operation) != 0) {
      throw std::runtime_error(std::string("a warp diverged: lanes wait at ") + operation +
                               " and at " + fiber.operation);
    }
    operation = fiber.operation;
  }
  if (operation == nullptr) return false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i]->state == state) fibers[i]->state = State::kReady;
  }
  return true;
}

/// Calls `body` with the bounds of each `size` threads of [begin, end).
template <typename Body>
void in_order(size_t begin, size_t end, size_t size, Body body) {
  const size_t parts = (end - begin + size - 1) / size;
  for (size_t i = 0; i < parts; ++i) {
    const size_t first = begin + (reverse_order ? parts - 1 - i : i) * size;
    body(first, std::min(first + size, end));
  }
}

/// As far as the warp gets without other warps. So each gets, before the next one starts: one that
/// does not wait for the others' data works without them.
void run_warp(size_t begin, size_t end) {
  do {
    in_order(begin, end, 1, [](size_t i, size_t) {
      if (fibers[i]->state == State::kReady) resume(*fibers[i]);
    });
  } while (release(begin, end, State::kAtWarp));
}

void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    fiber.thread = static_cast<int>(i);
    fiber.warp = static_cast<int>(i) / kWarpSize;
    fiber.lane = static_cast<int>(i) % kWarpSize;
    fiber.state = State::kReady;
    fiber.parity = 0;
    fiber.open_group.clear();
    fiber.groups.clear();
    fiber.unpublished.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::memset(shared, 0xff, shared_size);  // NaN in every type
  std::fill(shared_of_async_proxy.begin(), shared_of_async_proxy.end(), 0xff);
  forget_products(threads);
  do {
    in_order(0, threads, kWarpgroupSize, [](size_t begin, size_t end) {
      do {
        in_order(begin, end, kWarpSize, run_warp);
      } while (release(begin, end, State::kAtWarpgroup));
    });
  } while (release(0, threads, State::kAtBlock));
  for (size_t i = 0; i < threads; ++i) {
    if (fibers[i]->state != State::kDone) {
      throw std::runtime_error("deadlock: threads wait where others never come");
    }
  }
}

void complete(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.valid) {
      std::memcpy(shared + copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(shared + copy.shared, 0, copy.bytes);
    }
    running->unpublished.emplace_back(copy.shared, copy.bytes);
  }
}

}  // namespace

WarpData meet_warp(const char* operation, const void* mine, size_t bytes) {
  Fiber* self = running;
  unsigned char* slots = warps[self->warp].slots[self->parity];
  self->parity ^= 1;
  if (bytes > 0) std::memcpy(slots + self->lane * kSlotBytes, mine, bytes);
  wait_as(State::kAtWarp, operation);
  return {slots};
}

void meet_warpgroup(const char* operation) { wait_as(State::kAtWarpgroup, operation); }
void meet_block() { wait_as(State::kAtBlock, "syncthreads"); }

int lane_index() { return running->lane; }
int thread_index() { return running->thread; }
bool is_eager() { return eager_copies; }
unsigned char* shared_memory() { return shared; }
size_t shared_memory_size() { return shared_size; }
int shared_memory_on_offer() { return shared_bytes_on_offer; }

const unsigned char* shared_memory_of_async_proxy() { return shared_of_async_proxy.data(); }
void publish_to_async_proxy() {
  for (const auto& [at, bytes] : std::exchange(running->unpublished, {})) {
    std::memcpy(shared_of_async_proxy.data() + at, shared + at, bytes);
  }
}

void copy_async(uint32_t to, const void* global, size_t bytes, bool valid) {
  if (to % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0 ||
      to + bytes > shared_size) {
    throw std::runtime_error("cp.async: address unaligned or out of shared memory");
  }
  const Copy copy{to, global, bytes, valid};
  if (eager_copies) {
    complete({copy});
  } else {
    running->open_group.push_back(copy);
  }
}

void copy_async_commit() { running->groups.push_back(std::exchange(running->open_group, {})); }

void copy_async_wait(int pending) {
  auto& groups = running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    complete(groups.front());
    groups.pop_front();
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.resize((threads + kWarpSize - 1) / kWarpSize);
  shared_storage.resize(shared_bytes + 1024);
  shared_of_async_proxy.resize(shared_bytes);
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared_storage.data());
  shared = shared_storage.data() + (1024 - address % 1024) % 1024;
  shared_size = shared_bytes;
  kernel = &body;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads);
      }
    }
  }
}

}  // namespace emulator

extern "C" void emulator_configure(bool reverse, bool eager, int shared_bytes) {
  emulator::reverse_order = reverse;
  emulator::eager_copies = eager;
  emulator::shared_bytes_on_offer = shared_bytes;
}
