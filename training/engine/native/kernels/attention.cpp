// Attention, forward.
//
// A work item is up to 32 rows (position-major, then the query heads of one key/value head): a
// decoded token's heads share a tile, and so do neighbouring positions of a prompt. It goes through
// the keys a span at a time: scores, which stay in the first cache, their maximum, probabilities,
// product with the values. A larger maximum rescales what earlier spans gave. Spans begin at
// multiples of their length, so a row is rescaled at the same places whatever shares its tile; by
// exactly 1 where nothing changes for it.
#include "attention.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "amx.hpp"
#include "attention_math.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

constexpr int kRows = amx::kTileRows;
constexpr int kMaxTiles = 2;                   // row tiles that are taken together
constexpr int kItemTiles = 8;                  // of an item: they pass over the same keys
constexpr int kScoreTile = kRows * kLanes;     // floats of 16 rows x 16 keys
constexpr int kScoreBlock = 2 * kScoreTile;    // floats of 16 rows x one cache block
constexpr int kSpanBlocks = 8;                 // scores of 32 rows and a span: 32 KiB
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Call {
  const AttentionShape& shape;
  const bf16* qkv;
  std::ptrdiff_t ld;
  LayerCache cache;
  bf16* o;
  float* lse;
};

struct Item {
  const SequenceRows* sequence;
  int kv_head;
  int first;  // of the sequence's rows times G
  int count;
};

// Where the rows of an item come from and what they may see.
struct Rows {
  int count;
  std::ptrdiff_t row[kMaxTiles * kRows];
  int head[kMaxTiles * kRows];
  int position[kMaxTiles * kRows];

  Rows(const Item& item, int group) : count(item.count) {
    int index = item.first / group, member = item.first % group;
    for (int r = 0; r < count; ++r) {
      row[r] = item.sequence->row + index;
      head[r] = item.kv_head * group + member;
      position[r] = item.sequence->position + index;
      if (++member == group) member = 0, ++index;
    }
  }

  int in_tile(int tile) const { return std::clamp(count - tile * kRows, 0, kRows); }
  int first_position() const { return position[0]; }
  int last_position() const { return position[count - 1]; }
};

template <int kTiles>
struct alignas(64) RowState {
  static constexpr int kCount = kTiles * kRows;
  f32x16 maxima[kCount];           // of a span, still apart by key % 16
  f32x16 sums[kCount];             // likewise, of all spans
  float maximum[kCount];           // of all spans
  float exponent[kCount] = {};     // maximum * scale * log2 e, 0 while there is none
  float correction[kCount] = {};   // of what earlier spans gave
  float inverse_sum[kCount] = {};

  RowState() {
    std::fill_n(sums, kCount, splat(0.0f));
    std::fill_n(maximum, kCount, kMinusInfinity);
  }
};

// [tile][D / 32][16 rows][32], left operands. Rows past the last keep what they had.
void load_queries(const Call& call, const Rows& rows, bf16* q) {
  const int head_dim = call.shape.head_dim;
  for (int r = 0; r < rows.count; ++r) {
    const bf16* from = call.qkv + rows.row[r] * call.ld + std::ptrdiff_t(rows.head[r]) * head_dim;
    bf16* to = q + r / kRows * kRows * head_dim + r % kRows * amx::kTileSum;
    for (int d = 0; d < head_dim; d += amx::kTileSum) {
      _mm512_storeu_si512(to + d * kRows, _mm512_loadu_si512(from + d));
    }
  }
}

template <int kTiles>
inline void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int kTiles>
inline void load_accumulators(const float* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kScoreTile, 64);
  if constexpr (kTiles == 2) {
    _tile_loadd(2, c + kScoreBlock, 64);
    _tile_loadd(3, c + kScoreBlock + kScoreTile, 64);
  }
}

template <int kTiles>
inline void store_accumulators(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kScoreTile, 64);
  if constexpr (kTiles == 2) {
    _tile_stored(2, c + kScoreBlock, 64);
    _tile_stored(3, c + kScoreBlock + kScoreTile, 64);
  }
}

template <int kTiles>
void score_block(const bf16* q, const bf16* k, int head_dim, float* s) {
  const std::ptrdiff_t tile = std::ptrdiff_t(kRows) * head_dim;
  amx::fence();
  zero_accumulators<kTiles>();
  for (int d = 0; d < head_dim; d += amx::kTileSum) {
    const bf16* a = q + d * kRows;
    const bf16* b = k + d * kRows;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + tile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, a + tile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_accumulators<kTiles>(s);
}

// -inf where the row may not see the key, so that later passes need no masks.
void mask_block(const Rows& rows, int window, int first_key, float* s) {
  for (int r = 0; r < rows.count; ++r) {
    const int end = std::clamp(rows.position[r] + 1 - first_key, 0, kBlockTokens);
    const int begin =
        window > 0 ? std::clamp(rows.position[r] + 1 - window - first_key, 0, kBlockTokens) : 0;
    const std::uint64_t seen = (std::uint64_t(1) << end) - (std::uint64_t(1) << begin);
    const std::uint32_t hidden = ~std::uint32_t(begin < end ? seen : 0);
    float* row = s + r / kRows * kScoreBlock + r % kRows * kLanes;
    _mm512_mask_storeu_ps(row, __mmask16(hidden), splat(kMinusInfinity));
    _mm512_mask_storeu_ps(row + kScoreTile, __mmask16(hidden >> kLanes), splat(kMinusInfinity));
  }
}

template <int kTiles>
void update_maxima(const Rows& rows, const float* s, RowState<kTiles>& state) {
  for (int tile = 0; tile < kTiles; ++tile, s += kScoreBlock) {
    f32x16* lanes = state.maxima + tile * kRows;
    for (int r = 0, end = rows.in_tile(tile); r < end; ++r) {
      const f32x16 both = _mm512_max_ps(load(s + r * kLanes), load(s + kScoreTile + r * kLanes));
      lanes[r] = _mm512_max_ps(lanes[r], both);
    }
  }
}

// Scores become probabilities (not yet divided by their sum) in place: a row's 32 in bf16 take the
// place of its first 16 scores, so each tile is a left operand of P V.
template <int kTiles>
void exponentiate(const Rows& rows, float factor, float* s, RowState<kTiles>& state) {
  for (int tile = 0; tile < kTiles; ++tile, s += kScoreBlock) {
    for (int r = 0, end = rows.in_tile(tile); r < end; ++r) {
      float* low = s + r * kLanes;
      const f32x16 exponent = splat(state.exponent[tile * kRows + r]);
      const f32x16 p0 = exp2(_mm512_fmsub_ps(load(low), splat(factor), exponent));
      const f32x16 p1 = exp2(_mm512_fmsub_ps(load(low + kScoreTile), splat(factor), exponent));
      f32x16& lanes = state.sums[tile * kRows + r];
      lanes = _mm512_add_ps(lanes, _mm512_add_ps(p0, p1));
      _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    }
  }
}

// Takes the maxima of a span into account; true if some row's grew.
template <int kTiles>
bool raise_maxima(float factor, RowState<kTiles>& state) {
  __mmask16 grown = 0;
  for (int first = 0; first < kTiles * kRows; first += kRows) {
    const f32x16 old = load(state.maximum + first);
    const f32x16 now = _mm512_max_ps(old, combine_lanes(state.maxima + first, Max()));
    const __mmask16 grows = _mm512_cmp_ps_mask(now, old, _CMP_GT_OQ);
    const f32x16 exponent = _mm512_maskz_mul_ps(
        _mm512_cmp_ps_mask(now, splat(kMinusInfinity), _CMP_GT_OQ), now, splat(factor));
    const f32x16 less = _mm512_fmsub_ps(old, splat(factor), exponent);
    store(state.correction + first, _mm512_mask_mov_ps(splat(1.0f), grows, exp2(less)));
    store(state.maximum + first, now);
    store(state.exponent + first, exponent);
    grown |= grows;
  }
  return grown != 0;
}

// o: [D / 32][tile][2][16 rows][16 columns].
template <int kTiles>
void rescale(const Rows& rows, int head_dim, RowState<kTiles>& state, float* o) {
  for (int r = 0; r < rows.count; ++r) {
    const f32x16 factor = splat(state.correction[r]);
    state.sums[r] = _mm512_mul_ps(state.sums[r], factor);
    float* row = o + r / kRows * kScoreBlock + r % kRows * kLanes;
    for (int d = 0; d < head_dim; d += 2 * kRows, row += kTiles * kScoreBlock) {
      store(row, _mm512_mul_ps(load(row), factor));
      store(row + kScoreTile, _mm512_mul_ps(load(row + kScoreTile), factor));
    }
  }
}

template <int kTiles>
void finish_sums(const Call& call, const Rows& rows, RowState<kTiles>& state) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int first = tile * kRows;
    const f32x16 sums = combine_lanes(state.sums + first, Add());
    store(state.inverse_sum + first, _mm512_div_ps(splat(1.0f), sums));
    if (call.lse == nullptr) continue;
    alignas(64) float lse[kRows];
    store(lse, _mm512_mul_ps(_mm512_add_ps(load(state.exponent + first), log2(sums)),
                             splat(kLn2)));
    for (int r = first; r < std::min(rows.count, first + kRows); ++r) {
      call.lse[rows.row[r] * call.shape.num_heads + rows.head[r]] = lse[r - first];
    }
  }
}

// 32 columns of the output, for all rows, from [tile][2][16 rows][16 columns].
template <int kTiles>
void write_output(const Call& call, const Rows& rows, const RowState<kTiles>& state, int column,
                  const float* tiles) {
  const std::ptrdiff_t ld = call.shape.query_columns();
  for (int r = 0; r < rows.count; ++r) {
    const float* low = tiles + r / kRows * kScoreBlock + r % kRows * kLanes;
    const f32x16 factor = splat(state.inverse_sum[r]);
    // Plus zero: a sum of -0 becomes +0, as if further zeros had been added to it.
    const f32x16 a = _mm512_fmadd_ps(load(low), factor, splat(0.0f));
    const f32x16 b = _mm512_fmadd_ps(load(low + kScoreTile), factor, splat(0.0f));
    bf16* to = call.o + rows.row[r] * ld +
               std::ptrdiff_t(rows.head[r]) * call.shape.head_dim + column;
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

// Adds P V over a span to 32 columns of the output, or begins them.
template <int kTiles>
void multiply_values(const bf16* v, std::ptrdiff_t block_stride, const std::int32_t* blocks,
                     int num_blocks, const float* p, bool begins, float* o) {
  amx::fence();
  if (begins) {
    zero_accumulators<kTiles>();
  } else {
    load_accumulators<kTiles>(o);
  }
  for (int b = 0; b < num_blocks; ++b, p += kTiles * kScoreBlock) {
    const bf16* values = v + blocks[b] * block_stride;
    _tile_loadd(4, p, 64);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + amx::kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, p + kScoreBlock, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_accumulators<kTiles>(o);
}

// Up to 32 rows of an item on their way through the keys.
template <int kTiles>
class RowsForward {
 public:
  // ``first``: of at most 32 of the item's rows; q and o are theirs, s may be shared.
  RowsForward(const Call& call, const Item& item, int first, bf16* q, float* s, float* o)
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
      score_block<kTiles>(q_, k_ + blocks_[first + b] * block_stride_, call_.shape.head_dim, s);
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
                              begins, o);
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

  const Call& call_;
  const Rows rows_;
  const std::int32_t* blocks_;
  const std::ptrdiff_t block_stride_;
  int first_block_, end_block_;
  const bf16 *k_, *v_;
  bf16* q_;
  float *s_, *o_;
  RowState<kTiles> state_;
};

template <int kTiles>
void attend_item(const Call& call, const Item& item) {
  thread_local Scratch query_memory, score_memory, output_memory;
  const std::size_t elements = std::size_t(kTiles) * kRows * call.shape.head_dim;
  bf16* q = query_memory.get<bf16>(kItemTiles * elements);
  float* o = output_memory.get<float>(kItemTiles * elements);
  float* s = score_memory.get<float>(std::size_t(kMaxTiles) * kScoreBlock * kSpanBlocks);
  std::array<std::optional<RowsForward<kTiles>>, kItemTiles / kTiles> parts;
  int num_parts = 0;
  for (int first = 0; first < item.count; first += kTiles * kRows, ++num_parts) {
    parts[num_parts].emplace(call, item, first, q + num_parts * elements, s,
                             o + num_parts * elements);
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
  constexpr int kItemRows = kItemTiles * kRows;
  std::vector<Item> items;
  for (int s = 0; s < num_sequences; ++s) {
    const int rows = sequences[s].num_rows * shape.group();
    for (int first = (rows - 1) / kItemRows * kItemRows; first >= 0; first -= kItemRows) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        items.push_back({sequences + s, head, first, std::min(kItemRows, rows - first)});
      }
    }
  }
  return items;
}

}  // namespace

void attend(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
            const SequenceRows* sequences, int num_sequences, LayerCache cache, bf16* o,
            float* lse) {
  const Call call{shape, qkv, ld, cache, o, lse};
  const std::vector<Item> items = items_of(shape, sequences, num_sequences);
  parallel_for(int(items.size()), [&](int index, int) {
    const Item& item = items[index];
    if (item.count > kRows) {
      attend_item<2>(call, item);
    } else {
      attend_item<1>(call, item);
    }
  });
}

}  // namespace kernels
