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
  kCount
};
void* thread_scratch(Scratch slot, size_t bytes);

template <class T>
static inline T* thread_scratch(Scratch slot, int64_t count) {
  return static_cast<T*>(thread_scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace fastbert
