// Dense gradients of embedding tables, summed in one order and without atomics.
//
// The tables' rows are numbered as if the tables lay end to end; a key is such a number, or the one
// after the last for an id outside its table. The caller sorts the keys of all tokens and tables
// stably, so that a row's gradient is the sum of one contiguous run of places. Chunks of kChunk
// places are summed in parallel, however long the runs are: a run inside a chunk goes straight to
// its row, the shares of a longer one become partial sums, which the block of the chunk that it
// begins in adds in order. The same ids give the same bits.
#include "reduce.cuh"
#include "vector.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kChunkWarps = 4;  // of a block, one chunk each
constexpr int kInFlight = 8;    // rows loaded before the first is added
// A bound on registers, 96: left to itself ptxas takes 40 for one column a lane, and spills.
constexpr int kChunkBlocksPerSM = 5;
constexpr int kKeyThreads = 256;
constexpr int kNoKey = -1;  // before the first place and after the last
constexpr int kTables = 3;

struct TableIds {
  const int64_t* ids[kTables];  // null: that table is not there, nor those after it
  int64_t entries[kTables];

  __host__ __device__ int64_t all_entries() const { return entries[0] + entries[1] + entries[2]; }
};

template <typename Key>
__global__ void __launch_bounds__(kKeyThreads)
    embedding_keys_kernel(const TableIds tables, Key* __restrict__ keys, int64_t tokens) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (token >= tokens) return;
  int64_t first = 0;
#pragma unroll
  for (int t = 0; t < kTables; ++t) {
    if (tables.ids[t] == nullptr) return;
    const int64_t id = tables.ids[t][token];
    const bool inside = id >= 0 && id < tables.entries[t];
    keys[t * tokens + token] = static_cast<Key>(inside ? first + id : tables.all_entries());
    first += tables.entries[t];
  }
}

struct TableGradients {
  const void* de;  // (tokens, cols)
  const void* keys;
  bool narrow_keys;
  const int64_t* order;  // the place that each sorted key had: table · tokens + token
  void* grads[kTables];  // (entries, cols)
  int64_t entries[kTables];
  float* partials;  // (chunks, 2, cols)
  int64_t places, tokens, cols;

  __device__ __forceinline__ int key(int64_t place) const {
    if (place < 0 || place >= places) return kNoKey;
    return narrow_keys ? static_cast<const int16_t*>(keys)[place]
                       : static_cast<const int32_t*>(keys)[place];
  }

  /// The row of its table's gradient that a key names; null for an id outside its table. Without
  /// a loop: an index known only at run time would put the arrays in local memory.
  template <typename T>
  __device__ __forceinline__ T* row(int64_t key) const {
    const int64_t position = key - entries[0], token_type = position - entries[1];
    if (position < 0) return static_cast<T*>(grads[0]) + key * cols;
    if (token_type < 0) return static_cast<T*>(grads[1]) + position * cols;
    if (token_type < entries[2]) return static_cast<T*>(grads[2]) + token_type * cols;
    return nullptr;
  }

  /// A chunk's share of the run that it is the middle or the end of.
  __device__ __forceinline__ float* head(int64_t chunk) const {
    return partials + chunk * 2 * cols;
  }
  /// Its share of the run that begins in it and goes on.
  __device__ __forceinline__ float* tail(int64_t chunk) const { return head(chunk) + cols; }
};

/// Partial sums of kWidth columns in registers, moved in 16-byte accesses where kWidth is not 1.
template <int kWidth>
struct PartialSums {
  static constexpr int kPart = kWidth == 1 ? 1 : 4, kParts = kWidth / kPart;
  Packed<float, kPart> parts[kParts];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) parts[part].clear();
  }
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) parts[part].load_read_only(from + part * kPart);
  }
  __device__ __forceinline__ void add_to(float (&sums)[kWidth]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float values[kPart];
      parts[part].unpack(values);
#pragma unroll
      for (int i = 0; i < kPart; ++i) sums[part * kPart + i] += values[i];
    }
  }
  __device__ __forceinline__ static void store(float* to, const float (&sums)[kWidth]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float values[kPart];
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[i] = sums[part * kPart + i];
      cuda::store<float, kPart>(to + part * kPart, values);
    }
  }
};

/// Sums a chunk of places, run by run: one warp a chunk, kWidth columns a lane.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kChunkWarps, kChunkBlocksPerSM)
    embedding_chunks_kernel(const TableGradients p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kChunkWarps + threadIdx.y;
  const int64_t begin = chunk * kChunk, end = min(begin + kChunk, p.places);
  if (begin >= end) return;  // a whole warp
  const int lane = threadIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * kWarpSize + lane) * kWidth;
  const bool in_row = col < p.cols;
  const T* de = static_cast<const T*>(p.de) + col;
  const int before = p.key(begin - 1);

  float sums[kWidth] = {};
  int key = kNoKey, next = kNoKey;
  for (int64_t first = begin; first < end; first += kWarpSize) {
    // A lane looks up one place for all.
    const int count = static_cast<int>(min(end - first, int64_t{kWarpSize}));
    const int64_t place = first + min(lane, count - 1);
    const int lane_key = p.key(place), lane_next = p.key(place + 1);
    const int64_t lane_token = p.order[place] % p.tokens;
    for (int at = 0; at < count; at += kInFlight) {
      Packed<T, kWidth> rows[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t token = __shfl_sync(kFullWarp, lane_token, at + i);
        rows[i].clear();
        if (in_row && at + i < count) rows[i].load_read_only(de + token * p.cols);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + i >= count) break;
        float row[kWidth];
        rows[i].unpack(row);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[j] += row[j];
        key = __shfl_sync(kFullWarp, lane_key, at + i);
        next = __shfl_sync(kFullWarp, lane_next, at + i);
        if (key == next) continue;
        // The run ends here. Keys ascend: it began before the chunk exactly if its key was there.
        T* to = p.row<T>(key);
        if (in_row && key == before) {
          PartialSums<kWidth>::store(p.head(chunk) + col, sums);
        } else if (in_row && to != nullptr) {
          store<T, kWidth>(to + col, sums);
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[j] = 0.0f;
      }
    }
  }
  if (in_row && key == next) {  // the last run goes on
    PartialSums<kWidth>::store((key == before ? p.head(chunk) : p.tail(chunk)) + col, sums);
  }
}

/// Finishes the run, if any, that begins in the block's chunk and goes on: its tail, then the heads
/// of the chunks after it, which the warps share.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarpSize* kColumnWarps)
    embedding_joins_kernel(const TableGradients p) {
  const int64_t chunk = blockIdx.x, end = (chunk + 1) * kChunk;
  const int key = p.key(end - 1);
  if (key == kNoKey || key != p.key(end) || key == p.key(end - kChunk - 1)) return;
  T* to = p.row<T>(key);
  if (to == nullptr) return;  // until here the same for the whole block
  const int warp = threadIdx.y;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * kWarpSize + threadIdx.x) * kWidth;
  const bool in_row = col < p.cols;

  PartialSums<kWidth> shares[kInFlight];
  float sums[kWidth] = {};
  if (in_row && warp == 0) {
    shares[0].load(p.tail(chunk) + col);
    shares[0].add_to(sums);
  }
  bool goes_on = true;
  for (int64_t first = chunk + 1 + warp; goes_on; first += kColumnWarps * kInFlight) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t other = first + i * kColumnWarps;
      goes_on = p.key(other * kChunk) == key;
      shares[i].clear();
      if (in_row && goes_on) shares[i].load(p.head(other) + col);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) shares[i].add_to(sums);
  }
  sum_column_warps<kWidth>(sums, to, col, p.cols);
}

int64_t chunks_of(int64_t places) { return ceil_div<int64_t>(places, kChunk); }

/// Whether the keys are int16: checks that `key_bytes` is a width there is, and that it is enough.
bool keys_are_narrow(int key_bytes, int64_t entries, const char* op) {
  if (key_bytes != 2 && key_bytes != 4) {
    throw std::invalid_argument(std::string(op) + ": key_bytes is " + std::to_string(key_bytes) +
                                ", expected 2 or 4");
  }
  if (entries > (key_bytes == 2 ? INT16_MAX : INT32_MAX)) {
    throw std::invalid_argument(std::string(op) + ": too large: " + std::to_string(entries) +
                                " table rows do not fit keys of " + std::to_string(key_bytes) +
                                " bytes");
  }
  return key_bytes == 2;
}

}  // namespace

void embedding_keys(const int64_t* input_ids, const int64_t* position_ids,
                    const int64_t* token_type_ids, void* keys, int64_t tokens, int64_t num_words,
                    int64_t num_positions, int64_t num_token_types, int key_bytes,
                    cudaStream_t stream) {
  constexpr const char* kOp = "embedding_keys";
  const TableIds tables{{input_ids, position_ids, token_type_ids},
                        {num_words, num_positions, num_token_types}};
  const bool narrow = keys_are_narrow(key_bytes, tables.all_entries(), kOp);
  if (tokens == 0) return;
  const dim3 grid(grid_extent(ceil_div<int64_t>(tokens, kKeyThreads), kOp));
  if (narrow) {
    launch(kOp, embedding_keys_kernel<int16_t>, grid, dim3(kKeyThreads), 0, stream, tables,
           static_cast<int16_t*>(keys), tokens);
  } else {
    launch(kOp, embedding_keys_kernel<int32_t>, grid, dim3(kKeyThreads), 0, stream, tables,
           static_cast<int32_t*>(keys), tokens);
  }
}

int64_t embedding_gradients_workspace(int64_t places, int64_t cols) {
  return 2 * chunks_of(places) * cols;
}

void embedding_gradients(const void* de, const void* keys, const int64_t* order, void* dword,
                         void* dposition, void* dtoken_type, float* workspace, int64_t places,
                         int64_t tokens, int64_t cols, int64_t num_words, int64_t num_positions,
                         int64_t num_token_types, int key_bytes, int dtype, cudaStream_t stream) {
  constexpr const char* kOp = "embedding_gradients";
  const bool narrow = keys_are_narrow(key_bytes, num_words + num_positions + num_token_types, kOp);
  const TableGradients p{de,
                         keys,
                         narrow,
                         order,
                         {dword, dposition, dtoken_type},
                         {num_words, num_positions, num_token_types},
                         workspace,
                         places,
                         tokens,
                         cols};
  if (places == 0 || cols == 0) return;
  with_type(dtype, kOp, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int64_t chunks = chunks_of(places);
      const int64_t column_blocks = ceil_div<int64_t>(cols, kWarpSize * kWidth);
      const unsigned columns = grid_extent(column_blocks, kOp, kMostBlocksY);
      launch(kOp, embedding_chunks_kernel<T, kWidth>,
             dim3(grid_extent(ceil_div<int64_t>(chunks, kChunkWarps), kOp), columns),
             dim3(kWarpSize, kChunkWarps), 0, stream, p);
      launch(kOp, embedding_joins_kernel<T, kWidth>, dim3(grid_extent(chunks, kOp), columns),
             dim3(kWarpSize, kColumnWarps), kColumnSharedBytes<kWidth>, stream, p);
    };
    if (aligned16(de, dword, dposition, dtoken_type, workspace) && cols % kVectorWidth<T> == 0) {
      run(std::integral_constant<int, kVectorWidth<T>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fastbert::cuda
