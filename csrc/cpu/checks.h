// Checks of what comes from outside and would otherwise be used as an address. Each throws
// std::invalid_argument that names the argument, the position, the value and the bound.
#pragma once

#include <cstdint>

namespace fastbert {

/// 0 <= ids[i] < bound.
void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t bound);

/// 0 <= labels[i] < vocab, or labels[i] == ignore_index.
void check_labels(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index);

/// 0 <= index[i] < bound, strictly ascending.
void check_index(const int64_t* index, int64_t count, int64_t bound);

/// cu_seqlens (num_sequences + 1) starts at 0, does not descend, ends at num_tokens, and no sequence
/// is longer than max_seqlen.
void check_cu_seqlens(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens,
                      int64_t max_seqlen);

}  // namespace fastbert
