#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>

namespace fastbert {
namespace {

/// One parallel loop: threads take the next piece until none is left.
struct Region {
  Region(int64_t n, int64_t grain, RangeFunction function, void* context)
      : n(n), grain(grain), function(function), context(context) {}

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      function(context, begin, std::min(begin + grain, n));
    }
  }

  const int64_t n;
  const int64_t grain;
  const RangeFunction function;
  void* const context;
  std::atomic<int64_t> next{0};
};

// ------------------------------------------------------------------------ OpenMP, where it lives

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                              unsigned flags);

/// GOMP_parallel of the libgomp that is already in the process (torch's before another). Nothing is
/// ever loaded for it, so a process without OpenMP stays one.
class Gomp {
 public:
  /// nullptr where there is none.
  GompParallel find() {
    if (GompParallel found = found_.load(std::memory_order_acquire)) return found;
    const std::lock_guard<std::mutex> lock(mutex_);
    Scan scan{scanned_loads_, 0, {}};
    dl_iterate_phdr(&visit, &scan);
    scanned_loads_ = scan.loads;
    if (scan.path.empty()) return nullptr;
    void* library = dlopen(scan.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    const auto found = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    found_.store(found, std::memory_order_release);
    return found;
  }

 private:
  struct Scan {
    unsigned long long known_loads;  // libraries loaded up to the scan before
    unsigned long long loads;
    std::string path;
  };

  static int visit(dl_phdr_info* info, size_t, void* data) {
    Scan& scan = *static_cast<Scan*>(data);
    scan.loads = info->dlpi_adds;
    if (scan.loads == scan.known_loads) return 1;  // nothing new, so nothing to find
    const char* path = info->dlpi_name;
    const char* slash = std::strrchr(path, '/');
    if (std::strncmp(slash != nullptr ? slash + 1 : path, "libgomp", 7) != 0) return 0;
    scan.path = path;
    return std::strstr(path, "/torch/") != nullptr;  // the search ends at torch's
  }

  std::atomic<GompParallel> found_{nullptr};
  std::mutex mutex_;
  unsigned long long scanned_loads_ = 0;
};

// ------------------------------------------------------------------------------ a pool of our own

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Looks for `condition`, by default some tens of microseconds long; true if it came.
template <class Condition>
bool watch(Condition condition, int turns = 500) {
  for (int turn = 0; turn < turns; ++turn) {
    if (condition()) return true;
    pause_cpu();
  }
  return false;
}

/// Workers that watch a moment for the next region, then sleep. The ops of one layer follow each
/// other closely, and calls of a small model with 0.1 ms of Python between them; to wake a worker
/// takes 30 us or more. One region at a time: a second caller works alone meanwhile.
class Pool {
 public:
  /// False if the pool was busy and nothing was done.
  bool run(Region& region, int num_threads) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      hire(num_threads - 1);
      region_ = &region;
      seats_ = num_threads - 1;
      generation_.fetch_add(1, std::memory_order_relaxed);
    }
    wake_.notify_all();
    region.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      seats_ = 0;  // whoever has not come by now is not needed
    }
    watch([this] { return seated_.load(std::memory_order_relaxed) == 0; });
    {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return seated_.load(std::memory_order_relaxed) == 0; });
    }
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  void hire(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {
      // The system grants no more threads: those that are there do the work.
    }
  }

  void serve() {
    constexpr int kMoment = 16000;  // turns of 40 (or 140) cycles: 0.2 ms or more
    uint64_t seen = 0;
    const auto called = [&] { return generation_.load(std::memory_order_relaxed) != seen; };
    for (;;) {
      watch(called, kMoment);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, called);
      seen = generation_.load(std::memory_order_relaxed);
      if (seats_ == 0) continue;
      --seats_;
      seated_.fetch_add(1, std::memory_order_relaxed);
      Region* const region = region_;
      lock.unlock();
      region->work();
      lock.lock();
      if (seated_.fetch_sub(1, std::memory_order_relaxed) == 1) done_.notify_one();
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;  // guards all below; the atomics are also watched without it
  std::condition_variable wake_;
  std::condition_variable done_;
  Region* region_ = nullptr;
  std::atomic<uint64_t> generation_{0};
  int workers_ = 0;
  int seats_ = 0;               // workers that may still join the region
  std::atomic<int> seated_{0};  // workers in it
};

// --------------------------------------------------------------------------- state of the process

/// Never destroyed: workers may sleep on it while the process ends.
struct Threads {
  Gomp gomp;
  Pool pool;
  bool trust_gomp = true;
  std::atomic<int> shared_out{0};  // threads in all ThreadShares
};

std::atomic<Threads*> threads{nullptr};
std::atomic<bool> gomp_before_fork{false};

void before_fork() { gomp_before_fork.store(threads.load()->gomp.find() != nullptr); }

/// A fork leaves the workers behind, ours and libgomp's, which would wait for them for ever. So the
/// child starts afresh, and with its own pool if libgomp may have had workers.
void after_fork_in_child() {
  Threads* fresh = new Threads;
  fresh->trust_gomp = threads.load()->trust_gomp && !gomp_before_fork.load();
  threads.store(fresh);
}

Threads& current_threads() {
  static const bool initialised = [] {
    threads.store(new Threads);
    pthread_atfork(&before_fork, nullptr, &after_fork_in_child);
    return true;
  }();
  (void)initialised;
  return *threads.load(std::memory_order_acquire);
}

}  // namespace

void run_parallel(int64_t n, int64_t grain, int num_threads, RangeFunction function,
                  void* context) {
  const int64_t pieces = (n + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(num_threads, pieces));
  Region region(n, grain, function, context);
  Threads& threads = current_threads();
  const GompParallel gomp = threads.trust_gomp ? threads.gomp.find() : nullptr;
  if (gomp != nullptr) {
    gomp([](void* data) { static_cast<Region*>(data)->work(); }, &region,
         static_cast<unsigned>(team), 0);
  } else if (!threads.pool.run(region, team)) {
    region.work();
  }
}

// ------------------------------------------------------------------------------------------ stages

namespace {

/// Each worker has pieces of its own in every stage: those whose number leaves its own when divided
/// by the number of workers. So it meets the same columns of weights, rows and heads again, and no
/// cache line but the count of what is done goes from core to core. Whoever has none left watches
/// for about a microsecond, as far apart as threads come to an end that do the same, and then takes
/// those of others: a thread may come late, or never. A piece waits only for pieces of the stage
/// before, all of which are in the hands of running threads by then: somebody always gets on.
class StagedLoop {
 public:
  /// `taken`: workers · row_of(stages) zeros.
  StagedLoop(const int64_t* first, int64_t stages, int workers, std::atomic<int32_t>* taken,
             StageFunction function, void* context)
      : first_(first),
        stages_(stages),
        workers_(workers),
        taken_(taken),
        function_(function),
        context_(context) {}

  /// Counters of a worker, so many that none shares a cache line with the next one's.
  static int64_t row_of(int64_t stages) { return (stages + 15) / 16 * 16; }

  void work(int worker) {
    for (int64_t stage = 0; stage < stages_; ++stage) {
      reach(stage, worker);
      take_all(stage, worker, worker);
    }
    reach(stages_, worker);
  }

 private:
  /// Returns when the stages before `stage` are done.
  void reach(int64_t stage, int worker) {
    constexpr int kShortly = 80;
    const auto ready = [&] { return done_.load(std::memory_order_acquire) >= first_[stage]; };
    if (watch(ready, kShortly)) return;
    for (int other = 1; other < workers_; ++other) {
      take_all(stage - 1, (worker + other) % workers_, worker);
    }
    // What is waited for is being worked on. Others may need this core for it.
    while (!watch(ready)) std::this_thread::yield();
  }

  /// Runs what is left of the pieces of `owner`.
  void take_all(int64_t stage, int owner, int worker) {
    const int64_t pieces = first_[stage + 1] - first_[stage];
    std::atomic<int32_t>& taken = taken_[owner * row_of(stages_) + stage];
    for (;;) {
      int64_t piece =
          owner + static_cast<int64_t>(taken.load(std::memory_order_relaxed)) * workers_;
      if (piece >= pieces) return;
      piece =
          owner + static_cast<int64_t>(taken.fetch_add(1, std::memory_order_relaxed)) * workers_;
      if (piece >= pieces) return;
      function_(context_, stage, piece, worker);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  const int64_t* const first_;
  const int64_t stages_;
  const int workers_;
  std::atomic<int32_t>* const taken_;
  const StageFunction function_;
  void* const context_;
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace

void run_stages(const int64_t* first, int64_t stages, int num_threads, StageFunction function,
                void* context) {
  using Count = std::atomic<int32_t>;
  const int64_t counts = num_threads * StagedLoop::row_of(stages);
  Count* const taken = static_cast<Count*>(
      thread_scratch(Scratch::kStages, static_cast<size_t>(counts) * sizeof(Count)));
  for (int64_t i = 0; i < counts; ++i) new (taken + i) Count(0);
  StagedLoop loop(first, stages, num_threads, taken, function, context);
  // Each index is one thread's turn at the loop.
  parallel_for(num_threads, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) loop.work(static_cast<int>(worker));
  });
}

ThreadShare::ThreadShare(int wanted) {
  static const int cores = static_cast<int>(std::thread::hardware_concurrency());
  std::atomic<int>& taken = current_threads().shared_out;
  int others = taken.load(std::memory_order_relaxed);
  do {
    count_ = others == 0 ? wanted : std::clamp(cores - others, 1, wanted);
  } while (!taken.compare_exchange_weak(others, others + count_, std::memory_order_relaxed));
}

ThreadShare::~ThreadShare() {
  current_threads().shared_out.fetch_sub(count_, std::memory_order_relaxed);
}

// ----------------------------------------------------------------------------------------- scratch

namespace {

constexpr size_t kScratchAlignment = 64;

struct ScratchBuffers {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Buffer buffers[static_cast<int>(Scratch::kCount)];

  ~ScratchBuffers() {
    for (Buffer& buffer : buffers) std::free(buffer.data);
  }
};

thread_local ScratchBuffers scratch_buffers;

}  // namespace

void* thread_scratch(Scratch slot, size_t bytes) {
  ScratchBuffers::Buffer& buffer = scratch_buffers.buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes || buffer.data == nullptr) {
    const size_t rounded = (bytes / kScratchAlignment + 1) * kScratchAlignment;
    std::free(buffer.data);
    buffer = {};
    buffer.data = std::aligned_alloc(kScratchAlignment, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace fastbert
