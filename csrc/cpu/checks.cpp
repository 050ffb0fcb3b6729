#include "checks.h"

#include <stdexcept>
#include <string>

namespace fastbert {
namespace {

/// "name[i] = value"
std::string element(const char* name, int64_t i, int64_t value) {
  return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(value);
}

std::string range(int64_t bound) { return "[0, " + std::to_string(bound) + ")"; }

bool outside(int64_t value, int64_t bound) {
  return static_cast<uint64_t>(value) >= static_cast<uint64_t>(bound);
}

}  // namespace

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t bound) {
  for (int64_t i = 0; i < count; ++i) {
    if (outside(ids[i], bound)) {
      throw std::invalid_argument(element(name, i, ids[i]) + " is outside " + range(bound));
    }
  }
}

void check_labels(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index) {
  for (int64_t i = 0; i < count; ++i) {
    if (outside(labels[i], vocab) && labels[i] != ignore_index) {
      throw std::invalid_argument(element("labels", i, labels[i]) + " is outside " + range(vocab) +
                                  " and is not ignore_index = " + std::to_string(ignore_index));
    }
  }
}

void check_index(const int64_t* index, int64_t count, int64_t bound) {
  check_ids("index", index, count, bound);
  for (int64_t i = 1; i < count; ++i) {
    if (index[i] <= index[i - 1]) {
      throw std::invalid_argument(element("index", i, index[i]) + " does not ascend from " +
                                  element("index", i - 1, index[i - 1]));
    }
  }
}

void check_cu_seqlens(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens,
                      int64_t max_seqlen) {
  if (cu_seqlens[0] != 0) {
    throw std::invalid_argument(element("cu_seqlens", 0, cu_seqlens[0]) + " must be 0");
  }
  for (int64_t i = 1; i <= num_sequences; ++i) {
    const int64_t length = static_cast<int64_t>(cu_seqlens[i]) - cu_seqlens[i - 1];
    if (length < 0) {
      throw std::invalid_argument(element("cu_seqlens", i, cu_seqlens[i]) + " descends from " +
                                  element("cu_seqlens", i - 1, cu_seqlens[i - 1]));
    }
    if (length > max_seqlen) {
      throw std::invalid_argument("sequence " + std::to_string(i - 1) + " of cu_seqlens has " +
                                  std::to_string(length) +
                                  " tokens, more than max_seqlen = " + std::to_string(max_seqlen));
    }
  }
  if (cu_seqlens[num_sequences] != num_tokens) {
    throw std::invalid_argument(element("cu_seqlens", num_sequences, cu_seqlens[num_sequences]) +
                                " must end at the number of tokens, " + std::to_string(num_tokens));
  }
}

}  // namespace fastbert
