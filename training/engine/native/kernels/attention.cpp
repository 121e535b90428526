// Attention, forward.
//
// A work item is some rows (position-major, then the query heads of one key/value head): a decoded
// token's heads share a tile, and so do neighbouring positions of a prompt. It goes through the
// keys a span at a time: scores and their maximum, probabilities, product with the values. A larger
// maximum rescales what earlier spans gave. Spans begin at multiples of their length, so a row is
// rescaled at the same places whatever shares its tile; by exactly 1 where nothing changes for it.
#include "attention.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "tiles.hpp"
#include "attention_math.hpp"
#include "attention_rows.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

using namespace forward;

// Scores of 32 rows and a span, and its keys and values for a head of 64, stay in a core's second
// cache. Up to there one pass of 32 rows is fastest; over more keys than that 128 rows share what
// comes from memory (measured: 1.3 times as fast at 8192 keys).
constexpr int kSpanBlocks = 64;
constexpr int kShortItemTiles = 2;
constexpr int kLongItemTiles = 8;

template <int kTiles>
void score_block(const bf16* q, const bf16* k, int head_dim, int num_rows, float* s) {
  const std::ptrdiff_t tile = std::ptrdiff_t(kRows) * head_dim;
  tiles::Accumulators<kTiles, 2> sums(s, num_rows);
  sums.zero();
  sums.add(head_dim / tiles::kTileSum, 64, [&](int step) {
    const bf16* left = q + step * tiles::kTileElements;
    const bf16* right = k + step * tiles::kTileElements;
    return tiles::Operands{{left, left + tile}, {right, right + tile}};
  });
  sums.store();
}

// Adds P V over a span to 32 columns of the output, or begins them.
template <int kTiles>
void multiply_values(const bf16* v, std::ptrdiff_t block_stride, const std::int32_t* blocks,
                     int num_blocks, const float* p, bool begins, int num_rows, float* o) {
  tiles::Accumulators<kTiles, 2> sums(o, num_rows);
  if (begins) {
    sums.zero();
  } else {
    sums.load();
  }
  sums.add(num_blocks, 64, [&](int b) {
    const bf16* left = reinterpret_cast<const bf16*>(p + b * kTiles * kScoreBlock);
    const bf16* right = v + blocks[b] * block_stride;
    return tiles::Operands{{left, left + 2 * kScoreBlock}, {right, right + tiles::kTileElements}};
  });
  sums.store();
}

// Up to 32 rows of an item on their way through the keys.
template <int kTiles>
class RowsForward {
 public:
  // ``first``: of at most 32 of the item's rows; q and o are theirs, s may be shared.
  RowsForward(const ForwardCall& call, const Item& item, int first, bf16* q, float* s, float* o)
      : call_(call),
        rows_({item.sequence, item.kv_head, item.first + first,
               std::min(kTiles * kRows, item.count - first)},
              call.shape.group()),
        blocks_(item.sequence->blocks),
        block_stride_(call.shape.num_kv_heads * std::ptrdiff_t(kBlockTokens) *
                      call.shape.head_dim),
        q_(q),
        s_(s),
        o_(o) {
    const std::ptrdiff_t head =
        item.kv_head * std::ptrdiff_t(kBlockTokens) * call.shape.head_dim;
    k_ = call.cache.k + head;
    v_ = call.cache.v + head;
    first_block_ = call.shape.window > 0
                       ? std::max(0, rows_.first_position() + 1 - call.shape.window) / kBlockTokens
                       : 0;
    end_block_ = rows_.last_position() / kBlockTokens + 1;
    load_queries(call_, rows_, q_);
  }

  int first_block() const { return first_block_; }
  int end_block() const { return end_block_; }

  // Those of blocks [begin, end) that some row may see.
  void visit_span(int begin, int end) {
    const int first = std::max(begin, first_block_), count = std::min(end, end_block_) - first;
    if (count <= 0) return;
    const bool begins = first == first_block_;
    const float factor = call_.shape.scale * kLog2E;
    std::fill_n(state_.maxima, kTiles * kRows, splat(kMinusInfinity));
    for (int b = 0; b < count; ++b) {
      float* s = s_ + b * kTiles * kScoreBlock;
      score_block<kTiles>(q_, k_ + blocks_[first + b] * block_stride_, call_.shape.head_dim,
                          rows_.count, s);
      const int key = (first + b) * kBlockTokens;
      if (!is_seen_by_all(key)) mask_block(rows_, call_.shape.window, key, s);
      update_maxima<kTiles>(rows_, s, state_);
    }
    if (raise_maxima(factor, state_) && !begins) {
      rescale<kTiles>(rows_, call_.shape.head_dim, state_, o_);
    }
    for (int b = 0; b < count; ++b) {
      exponentiate<kTiles>(rows_, factor, s_ + b * kTiles * kScoreBlock, state_);
    }
    float* o = o_;
    for (int d = 0; d < call_.shape.head_dim; d += 2 * kRows, o += kTiles * kScoreBlock) {
      multiply_values<kTiles>(v_ + d * kBlockTokens, block_stride_, blocks_ + first, count, s_,
                              begins, rows_.count, o);
    }
  }

  void finish() {
    finish_sums(call_, rows_, state_);
    const float* o = o_;
    for (int d = 0; d < call_.shape.head_dim; d += 2 * kRows, o += kTiles * kScoreBlock) {
      write_output(call_, rows_, state_, d, o);
    }
  }

 private:
  bool is_seen_by_all(int key) const {
    const int window = call_.shape.window;
    return key + kBlockTokens - 1 <= rows_.first_position() &&
           (window == 0 || key > rows_.last_position() - window);
  }

  const ForwardCall& call_;
  const Rows rows_;
  const std::int32_t* blocks_;
  const std::ptrdiff_t block_stride_;
  int first_block_, end_block_;
  const bf16 *k_, *v_;
  bf16* q_;
  float *s_, *o_;
  RowState<kTiles> state_;
};

// ``kMaxParts`` is 1 for most items: room for more costs a short one a quarter of its time.
template <int kTiles, int kMaxParts>
void attend_item(const ForwardCall& call, const Item& item) {
  thread_local Scratch query_memory, score_memory, output_memory;
  const int num_parts = divide_up(item.count, kTiles * kRows);
  const std::size_t elements = std::size_t(kTiles) * kRows * call.shape.head_dim;
  bf16* q = query_memory.get<bf16>(num_parts * elements);
  float* o = output_memory.get<float>(num_parts * elements);
  const int num_blocks =
      divide_up(item.sequence->position + item.sequence->num_rows, kBlockTokens);
  float* s = score_memory.get<float>(std::size_t(kTiles) * kScoreBlock *
                                     std::min(num_blocks, kSpanBlocks));
  std::array<std::optional<RowsForward<kTiles>>, kMaxParts> parts;
  for (int i = 0; i < num_parts; ++i) {
    parts[i].emplace(call, item, i * kTiles * kRows, q + i * elements, s, o + i * elements);
  }
  const int end = parts[num_parts - 1]->end_block();
  for (int begin = parts[0]->first_block() / kSpanBlocks * kSpanBlocks; begin < end;
       begin += kSpanBlocks) {
    for (int i = 0; i < num_parts; ++i) parts[i]->visit_span(begin, begin + kSpanBlocks);
  }
  for (int i = 0; i < num_parts; ++i) parts[i]->finish();
}

// The last rows of a sequence first: they see most keys, and the loop should end with small items.
std::vector<Item> items_of(const AttentionShape& shape, const SequenceRows* sequences,
                           int num_sequences) {
  std::vector<Item> items;
  for (int s = 0; s < num_sequences; ++s) {
    const SequenceRows& sequence = sequences[s];
    const bool is_long = sequence.position + sequence.num_rows > kSpanBlocks * kBlockTokens;
    const int item_rows = (is_long ? kLongItemTiles : kShortItemTiles) * kRows;
    const int rows = sequence.num_rows * shape.group();
    for (int first = (rows - 1) / item_rows * item_rows; first >= 0; first -= item_rows) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        items.push_back({&sequence, head, first, std::min(item_rows, rows - first)});
      }
    }
  }
  return items;
}

}  // namespace

void attend(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
            const SequenceRows* sequences, int num_sequences, LayerCache cache, bf16* o,
            float* lse) {
  const ForwardCall call{shape, qkv, ld, cache, o, lse};
  const std::vector<Item> items = items_of(shape, sequences, num_sequences);
  parallel_for(int(items.size()), [&](int index, int) {
    const Item& item = items[index];
    if (item.count <= kRows) {
      attend_item<1, 1>(call, item);
    } else if (item.count <= kShortItemTiles * kRows) {
      attend_item<kMaxTiles, 1>(call, item);
    } else {
      attend_item<kMaxTiles, kLongItemTiles / kMaxTiles>(call, item);
    }
  });
}

}  // namespace kernels
