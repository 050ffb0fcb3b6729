// A list of tensors as one sequence of blocks: the pieces of work of what treats all parameters of a
// model in one pass.
#pragma once

#include "rowwise.h"

namespace fastbert::FASTBERT_ISA {

/// The blocks of all tensors, numbered through; none spans two tensors. The partition depends on
/// the sizes alone.
class TensorBlocks {
 public:
  /// `numel(k)` is the size of tensor k.
  template <class Numel>
  TensorBlocks(int64_t tensors, Numel numel)
      : tensors_(tensors), first_(thread_scratch<int64_t>(Scratch::kShared, tensors + 1)) {
    first_[0] = 0;
    for (int64_t k = 0; k < tensors; ++k)
      first_[k + 1] = first_[k] + (numel(k) + kSize - 1) / kSize;
  }

  int64_t count() const { return first_[tensors_]; }

  /// The tensor of a block, and the block's first element in it.
  struct Place {
    int64_t tensor;
    int64_t start;
  };
  Place find(int64_t block) const {
    int64_t tensor = 0, end = tensors_;  // first_[tensor] <= block < first_[end]
    while (end - tensor > 1) {
      const int64_t middle = (tensor + end) / 2;
      (first_[middle] <= block ? tensor : end) = middle;
    }
    return {tensor, (block - first_[tensor]) * kSize};
  }

  static constexpr int64_t kSize = 16384;  // elements of a block; the last of a tensor has the rest

 private:
  const int64_t tensors_;
  int64_t* const first_;  // the number of each tensor's first block, and of all blocks
};

}  // namespace fastbert::FASTBERT_ISA
