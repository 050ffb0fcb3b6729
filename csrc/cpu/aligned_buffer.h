// Memory for weights and workspaces.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace fastbert {

/// Uninitialised memory, aligned to a cache line. From 2 MiB on it is made of whole huge pages
/// where the system has them: weights that are read from end to end at each call would miss the TLB
/// at every small page.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) {
    constexpr size_t kCacheLine = 64, kHugePage = size_t{1} << 21;
    const size_t alignment = bytes < kHugePage ? kCacheLine : kHugePage;
    size_ = (bytes / alignment + 1) * alignment;
    data_ = static_cast<char*>(std::aligned_alloc(alignment, size_));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~AlignedBuffer() { std::free(data_); }

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(AlignedBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  char* data_ = nullptr;
  size_t size_ = 0;
};

/// Cuts memory into arrays, each aligned to a cache line. Over no memory (nullptr) it hands out
/// null pointers and counts: the same cuts made twice, first to measure and then to place.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  bool measuring() const { return base_ == nullptr; }
  size_t bytes() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kCacheLine = 64;
    char* const start = measuring() ? nullptr : base_ + used_;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(start);
  }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fastbert
