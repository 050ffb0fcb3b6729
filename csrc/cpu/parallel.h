// Parallel loops of the native kernels, and scratch memory for them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert {

/// A piece of work: the indices [begin, end). It must not throw.
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

/// Runs `function` over [0, n) in pieces of `grain` indices on at most `num_threads` threads, the
/// caller among them, and returns when all is done. Pieces are handed out as threads come, so a
/// result that must not depend on the number of threads may depend on its index only.
///
/// Threads: those of the OpenMP runtime when the process has one loaded (torch's own, whose idle
/// workers spin and would fight any second pool for the cores), a private pool otherwise.
void run_parallel(int64_t n, int64_t grain, int num_threads, RangeFunction function, void* context);

/// `body(begin, end)` as above. The lambda's type keeps each instantiation in its own unit.
template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, int num_threads, const Body& body) {
  if (n <= 0) return;
  if (num_threads <= 1 || n <= grain) {
    body(static_cast<int64_t>(0), n);
    return;
  }
  run_parallel(
      n, grain, num_threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/// A piece of a stage. `worker` is less than num_threads, and no two pieces run at once with the
/// same.
using StageFunction = void (*)(void* context, int64_t stage, int64_t piece, int worker);

/// Runs stages one after the other: stage s has first[s + 1] - first[s] pieces (first[0] = 0),
/// which run in any order, and none of them before all pieces of the stages before are done.
///
/// This is one fork and one join however many stages there are: a worker takes its own pieces of a
/// stage, those with number % num_threads == worker, and watches a counter until all are done. No
/// barrier counts threads: one that comes late, or never, holds up nobody, as others then take its
/// pieces.
void run_stages(const int64_t* first, int64_t stages, int num_threads, StageFunction function,
                void* context);

/// `body(stage, piece, worker)` as above.
template <class Body>
static inline void for_stages(const int64_t* first, int64_t stages, int num_threads,
                              const Body& body) {
  run_stages(
      first, stages, num_threads,
      [](void* context, int64_t stage, int64_t piece, int worker) {
        (*static_cast<const Body*>(context))(stage, piece, worker);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/// How many threads a caller should use of the `wanted` that it may. Alone it gets them all;
/// several at once share the cores, as threads that wait for each other and for a core lose far
/// more than they gain. Every caller gets one. The share ends with the object.
class ThreadShare {
 public:
  explicit ThreadShare(int wanted);
  ThreadShare(const ThreadShare&) = delete;
  ~ThreadShare();

  int count() const { return count_; }

 private:
  int count_;
};

/// Scratch memory of the calling thread, 64-byte aligned, kept for the thread's life and grown on
/// demand. A slot's content is lost when the same slot is asked for again.
enum class Scratch : int {
  kPartials,  // of the thread that calls an op: sums of row blocks,
  kRows,      // one fp32 (fp64) row a token,
  kShared,    // what all threads of the op read (lists of work, of tokens);
  kRow,       // of each thread in a region: one row,
  kGradRow,   // its gradient,
  kMask,      // its dropout mask,
  kAttention,
  kLinear,    // a block of rows in the form that the kernel reads; the columns being packed
  kUnsigned,  // a block of int8 rows moved by 128
  kStages,    // of the thread that calls run_stages(): counters of pieces
  kCount
};
void* thread_scratch(Scratch slot, size_t bytes);

template <class T>
static inline T* thread_scratch(Scratch slot, int64_t count) {
  return static_cast<T*>(thread_scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace fastbert
