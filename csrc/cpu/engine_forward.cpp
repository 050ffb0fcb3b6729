#include "engine_forward.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace fastbert {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/// Bytes of the second-level cache that a block of rows may fill; weights pass through the rest.
int64_t cache_budget() {
  static const int64_t bytes = [] {
    constexpr int64_t kUnknown = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (size > 0 ? size : kUnknown) / 4 * 3;
#else
    return kUnknown / 4 * 3;
#endif
  }();
  return bytes;
}

/// What a block of rows holds between its steps.
struct Block {
  float* sum;
  float* inner;
  int8_t* quantized;
  float* scale;  // of the int8, by row
  float* offset;
};

class Forward {
 public:
  Forward(const Model& model, const Batch& batch, int num_threads, Workspace& workspace)
      : model_(model), batch_(batch), threads_(num_threads), work_(workspace) {
    cut();
    place();
  }

  void run() const {
    const auto& first = work_.first_pieces;
    for_stages(first.data(), static_cast<int64_t>(work_.stages.size()), threads_,
               [this](int64_t stage, int64_t piece, int worker) {
                 run_piece(work_.stages[stage], piece, worker);
               });
  }

 private:
  // ------------------------------------------------------------------------------------- the cut

  bool does_nothing(const Step& step) const {
    return step.kind == Step::Kind::kRows && step.make == Step::Make::kNothing &&
           (step.linear == nullptr || !step.linear->quantized()) &&
           (step.hidden < 0 || batch_.hidden_states == nullptr);
  }

  void cut() {
    // Weights are read once a block: with fewer rows, reading them would take longer than using
    // them.
    constexpr int64_t kFewestRows = 48;
    constexpr int64_t kMostRows = 192;
    const Model& m = model_;
    const int64_t row_bytes =
        4 * (m.sum_width + m.inner_width + m.hidden_size) + m.quantized_stride;
    const int64_t fit = std::clamp(cache_budget() / row_bytes / 16 * 16, kFewestRows, kMostRows);
    whole_blocks_ = threads_ == 1 || batch_.num_tokens >= threads_ * kFewestRows;
    blocks_ = whole_blocks_ ? threads_ * divide_up(batch_.num_tokens, threads_ * fit) : 1;

    cut_attention();
    work_.stages.clear();
    const int64_t steps = static_cast<int64_t>(m.steps.size());
    for (int64_t first = 0, last; first < steps; first = last) {
      last = first + 1;
      const Step& step = m.steps[first];
      if (step.kind == Step::Kind::kAttention) {
        const int64_t chunks = static_cast<int64_t>(work_.chunks.size());
        work_.stages.push_back({first, last, chunks, divide_up(step.heads, group_)});
      } else if (attends_by_thread(first)) {
        last = first + 2;
        work_.stages.push_back({first, last, 1, threads_});
      } else if (whole_blocks_) {
        while (last < steps && m.steps[last].kind != Step::Kind::kAttention) ++last;
        work_.stages.push_back({first, last, blocks_, 1});
      } else if (!does_nothing(step)) {
        work_.stages.push_back(step.kind == Step::Kind::kLinear ? tiles(first) : rows(first));
      }
    }
    work_.first_pieces.assign(1, 0);
    for (const Stage& stage : work_.stages) {
      const int64_t pieces = stage.row_parts * stage.column_parts;
      work_.first_pieces.push_back(work_.first_pieces.back() + pieces);
    }
  }

  /// A rows step of few tokens.
  Stage rows(int64_t step) const {
    return {step, step + 1, std::min<int64_t>(batch_.num_tokens, threads_), 1};
  }

  /// Of few tokens: whether q, k and v from `step` on and the attention over them are one stage, in
  /// which each thread attends to the heads that it has multiplied. Its columns must be whole blocks.
  bool attends_by_thread(int64_t step) const {
    const auto steps = model_.steps.begin() + step;
    if (whole_blocks_ || steps[0].kind != Step::Kind::kLinear ||
        steps[1].kind != Step::Kind::kAttention) {
      return false;
    }
    const int64_t heads = steps[1].heads;
    return heads % threads_ == 0 && heads / threads_ * model_.head_dim % kColumnBlock == 0;
  }

  /// A Linear of few tokens: one piece of columns a thread, one stream of weights from beginning to
  /// end, whose first block comes while the thread multiplies by the weights before it (upcoming()).
  /// Where there are too few columns, rows are cut too.
  Stage tiles(int64_t step) const {
    const int64_t blocks = divide_up(model_.steps[step].linear->packed.out, kColumnBlock);
    const int64_t columns = std::min<int64_t>(blocks, threads_);
    const int64_t rows = divide_up(threads_, columns);
    return {step, step + 1, std::min(rows, divide_up(batch_.num_tokens, 16)), columns};
  }

  /// Chunks of queries, and how many heads a piece of attention takes: several where that leaves
  /// four pieces or more for each thread, as neighbouring heads share cache lines and pages.
  void cut_attention() {
    constexpr int64_t kMostQueries = 512, kFewestQueries = 64;
    constexpr int64_t kPieceBytes = 1 << 20;  // of qkv and context: stays in L2 beside the scratch
    const int64_t heads = model_.context_width / model_.head_dim;
    int64_t longest = 0, queries = 2 * kMostQueries, chunks = 0;
    do {
      queries /= 2;
      chunks = 0;
      for (int64_t b = 0; b < batch_.num_sequences; ++b) {
        const int64_t length = batch_.cu_seqlens[b + 1] - batch_.cu_seqlens[b];
        longest = std::max(longest, length);
        chunks += divide_up(length, queries);
      }
    } while (chunks * heads < 4 * threads_ && queries > kFewestQueries);
    const int64_t fit = kPieceBytes / (longest * 4 * model_.head_dim * 4);
    group_ = std::clamp<int64_t>(std::min(fit, chunks * heads / (4 * threads_)), 1, heads);

    work_.chunks.clear();
    for (int64_t b = 0; b < batch_.num_sequences; ++b) {
      const int64_t start = batch_.cu_seqlens[b] - batch_.cu_seqlens[0];
      const int64_t length = batch_.cu_seqlens[b + 1] - batch_.cu_seqlens[b];
      for (int64_t query = 0; query < length; query += queries) {
        work_.chunks.push_back({start, length, query, std::min(queries, length - query), 0, 0});
      }
    }
    // The longest first: one that began last would keep a thread busy while the others wait.
    std::sort(work_.chunks.begin(), work_.chunks.end(),
              [](const AttentionPiece& a, const AttentionPiece& b) {
                return a.queries * a.length > b.queries * b.length;
              });
  }

  // -------------------------------------------------------------------------------------- memory

  void place() {
    Arena measure(nullptr);
    place(measure);
    if (work_.memory.size() < measure.bytes()) {
      work_.memory = AlignedBuffer();  // not both at once
      work_.memory = AlignedBuffer(measure.bytes());
    }
    Arena arena(work_.memory.data());
    place(arena);
  }

  void place(Arena& arena) {
    const Model& m = model_;
    qkv_ = arena.take<float>(batch_.num_tokens * m.qkv_width);
    context_ = arena.take<float>(batch_.num_tokens * m.context_width);
    const int64_t rows = divide_up(batch_.num_tokens, blocks_);
    const size_t before = arena.bytes();
    first_block_.sum = arena.take<float>(rows * m.sum_width);
    first_block_.inner = arena.take<float>(rows * m.inner_width);
    first_block_.quantized = arena.take<int8_t>(rows * m.quantized_stride);
    first_block_.scale = arena.take<float>(rows);
    first_block_.offset = arena.take<float>(rows);
    block_bytes_ = static_cast<int64_t>(arena.bytes() - before);
    if (whole_blocks_) arena.take<char>((threads_ - 1) * block_bytes_);
  }

  /// Each worker has its own block, or all share that of the whole batch.
  Block block_of(int worker) const {
    const int64_t offset = whole_blocks_ ? worker * block_bytes_ : 0;
    const auto moved = [offset](auto* array) {
      return reinterpret_cast<decltype(array)>(reinterpret_cast<char*>(array) + offset);
    };
    return {moved(first_block_.sum), moved(first_block_.inner), moved(first_block_.quantized),
            moved(first_block_.scale), moved(first_block_.offset)};
  }

  // -------------------------------------------------------------------------------------- pieces

  struct Rows {
    int64_t begin, end;
    int64_t origin;  // the token that comes first in `block`
    Block block;
  };

  void run_piece(const Stage& stage, int64_t piece, int worker) const {
    const int64_t row_part = piece / stage.column_parts, column_part = piece % stage.column_parts;
    const Step& first = model_.steps[stage.first_step];
    if (first.kind == Step::Kind::kAttention) return attend(first, row_part, column_part);
    Rows rows;
    rows.begin = batch_.num_tokens * row_part / stage.row_parts;
    rows.end = batch_.num_tokens * (row_part + 1) / stage.row_parts;
    rows.origin = whole_blocks_ ? rows.begin : 0;
    rows.block = block_of(worker);
    for (int64_t i = stage.first_step; i < stage.last_step; ++i) {
      const Step& step = model_.steps[i];
      if (step.kind == Step::Kind::kRows) {
        finish_rows(step, rows);
      } else if (i + 1 < stage.last_step && model_.steps[i + 1].kind == Step::Kind::kAttention) {
        return attend_by_thread(i, rows, column_part);
      } else {
        const Columns columns = columns_of(step, column_part, stage.column_parts);
        multiply(step, rows, columns, upcoming(i + 1, column_part));
      }
    }
  }

  /// The row of a token, `cols` wide, in a buffer.
  float* at(Buffer buffer, int64_t token, const Rows& rows, int64_t cols) const {
    switch (buffer) {
      case Buffer::kStream:
        return batch_.out + token * cols;
      case Buffer::kSum:
        return rows.block.sum + (token - rows.origin) * cols;
      case Buffer::kInner:
        return rows.block.inner + (token - rows.origin) * cols;
      case Buffer::kQkv:
        return qkv_ + token * cols;
      case Buffer::kContext:
        break;
    }
    return context_ + token * cols;
  }

  /// A rows step. Row by row, so that each is still in L1 when it is quantised.
  void finish_rows(const Step& step, const Rows& rows) const {
    if (does_nothing(step)) return;
    const Model& m = model_;
    const int64_t cols = step.linear != nullptr ? step.linear->packed.in : m.hidden_size;
    const bool quantize = step.linear != nullptr && step.linear->quantized();
    const int64_t stride = quantize ? m.linears->quantized_stride(cols) : 0;
    for (int64_t token = rows.begin; token < rows.end; ++token) {
      float* row = at(step.buffer, token, rows, cols);
      if (step.make != Step::Make::kNothing) {
        float* sum = at(Buffer::kSum, token, rows, cols);
        if (step.make == Step::Make::kEmbeddings) sum_embeddings(token, sum);
        m.kernels->layer_norm_rows(sum, step.norm.weight, step.norm.bias, 1, cols, m.layer_norm_eps,
                                   row);
      }
      if (step.hidden >= 0 && batch_.hidden_states != nullptr) {
        const int64_t at_token = step.hidden * batch_.hidden_tokens + token;
        std::memcpy(batch_.hidden_states + at_token * cols, row, cols * sizeof(float));
      }
      if (quantize) {
        const int64_t local = token - rows.origin;
        if (const float* multiplier = step.linear->input_multiplier) {
          // The stream stays as it is; its sum has been used.
          float* scaled = at(Buffer::kSum, token, rows, cols);
          for (int64_t i = 0; i < cols; ++i) scaled[i] = row[i] * multiplier[i];
          row = scaled;
        }
        m.linears->quantize_rows(row, 1, cols, step.linear->input_scale,
                                 rows.block.quantized + local * stride, rows.block.scale + local,
                                 rows.block.offset + local);
      }
    }
  }

  void sum_embeddings(int64_t token, float* sum) const {
    const auto row = [this](const Table& table, int64_t id) {
      const int64_t bytes = table.dtype == DType::kBFloat16 ? 2 : 4;
      return StoredRow{static_cast<const char*>(table.data) + id * model_.embedding_size * bytes,
                       table.dtype};
    };
    StoredRow parts[3];
    parts[0] = batch_.input_ids != nullptr
                   ? row(model_.word, batch_.input_ids[token])
                   : StoredRow{batch_.word_rows + token * model_.embedding_size, DType::kFloat32};
    parts[1] = row(model_.position, batch_.position_ids[token]);
    const bool typed = model_.token_type.data != nullptr;
    if (typed) {
      const int64_t* ids = batch_.token_type_ids;
      parts[2] = row(model_.token_type, ids != nullptr ? ids[token] : 0);
    }
    model_.kernels->sum_rows(parts, typed ? 3 : 2, model_.embedding_size, sum);
  }

  /// Columns [first, last) of a Linear, as LinearTable::run() takes them.
  struct Columns {
    int64_t first, last;
  };

  Columns columns_of(const Step& step, int64_t part, int64_t parts) const {
    const int64_t out = step.linear->packed.out, blocks = divide_up(out, kColumnBlock);
    return {blocks * part / parts * kColumnBlock,
            std::min(blocks * (part + 1) / parts * kColumnBlock, out)};
  }

  /// The first block of columns that the thread with this part of the columns meets from `step` on.
  Upcoming upcoming(int64_t step, int64_t part) const {
    const int64_t steps = static_cast<int64_t>(model_.steps.size());
    while (step < steps && model_.steps[step].kind != Step::Kind::kLinear) ++step;
    if (step == steps) return {nullptr, 0};
    const int64_t parts = whole_blocks_ ? 1 : tiles(step).column_parts;
    const Columns columns = columns_of(model_.steps[step], std::min(part, parts - 1), parts);
    return weights_of(model_.steps[step].linear->packed, columns.first);
  }

  /// The packed weights of the block of columns that begins with `first`.
  Upcoming weights_of(const PackedLinear& w, int64_t first) const {
    const int64_t bytes = model_.linears->packed_bytes(w.kind, w.in, kColumnBlock);
    return {static_cast<const char*>(w.weights) + first / kColumnBlock * bytes, bytes};
  }

  void multiply(const Step& step, const Rows& rows, Columns columns, Upcoming upcoming) const {
    const PackedLinear& w = step.linear->packed;
    LinearInput x = {};
    if (step.linear->quantized()) {
      const int64_t local = rows.begin - rows.origin;
      x.quantized = rows.block.quantized + local * model_.linears->quantized_stride(w.in);
      x.scale = rows.block.scale + local;
      x.offset = rows.block.offset + local;
    } else {
      x.values = at(step.buffer, rows.begin, rows, w.in);
    }
    const float* residual = step.residual ? at(Buffer::kStream, rows.begin, rows, w.out) : nullptr;
    float* y = at(step.output, rows.begin, rows, w.out);
    model_.linears->run(w, x, rows.end - rows.begin, columns.first, columns.last, step.activation,
                        residual, y, w.out, upcoming);
  }

  /// q, k and v of the heads of a part (attends_by_thread()), and attention over them.
  void attend_by_thread(int64_t qkv, const Rows& rows, int64_t part) const {
    const Step& linear = model_.steps[qkv];
    const Step& attention = model_.steps[qkv + 1];
    const int64_t heads = attention.heads / threads_, width = heads * model_.head_dim;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t first = (i * threads_ + part) * width;
      const Upcoming next = i < 2 ? weights_of(linear.linear->packed, first + threads_ * width)
                                  : upcoming(qkv + 2, part);
      multiply(linear, rows, {first, first + width}, next);
    }
    for (AttentionPiece piece : work_.chunks) {
      piece.first_head = part * heads;
      piece.heads = heads;
      model_.kernels->attention_piece(qkv_, piece, attention.heads, model_.head_dim, context_);
    }
  }

  void attend(const Step& step, int64_t chunk, int64_t group) const {
    AttentionPiece piece = work_.chunks[chunk];
    piece.first_head = group * group_;
    piece.heads = std::min(group_, step.heads - piece.first_head);
    model_.kernels->attention_piece(qkv_, piece, step.heads, model_.head_dim, context_);
  }

  const Model& model_;
  const Batch& batch_;
  const int threads_;
  Workspace& work_;
  bool whole_blocks_;  // of rows, each in one thread from attention to attention
  int64_t blocks_;
  int64_t group_;  // heads of a piece of attention
  float* qkv_;
  float* context_;
  Block first_block_;
  int64_t block_bytes_;
};

}  // namespace

void forward(const Model& model, const Batch& batch, int num_threads, Workspace& workspace) {
  Forward(model, batch, num_threads, workspace).run();
}

}  // namespace fastbert
