// Attention, forward.
//
// A work item is up to 32 rows (position-major, then the query heads of one key/value head): a
// decoded token's heads share a tile, and so do neighbouring positions of a prompt. Two passes, so
// that no partial result is ever rescaled: all scores and their maximum, then probabilities and
// their product with the values.
#include "attention.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "amx.hpp"
#include "attention_math.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

constexpr int kRows = amx::kTileRows;
constexpr int kMaxTiles = 2;                   // row tiles of an item
constexpr int kScoreTile = kRows * kLanes;     // floats of 16 rows x 16 keys
constexpr int kScoreBlock = 2 * kScoreTile;    // floats of 16 rows x one cache block
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

struct alignas(64) RowState {
  f32x16 lanes[kMaxTiles * kRows];         // maxima, then sums, still apart by key % 16
  float exponent[kMaxTiles * kRows];       // maximum * scale * log2 e
  float inverse_sum[kMaxTiles * kRows];
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
void score_block(const bf16* q, const bf16* k, int head_dim, float* s) {
  const std::ptrdiff_t tile = std::ptrdiff_t(kRows) * head_dim;
  amx::fence();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
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
  _tile_stored(0, s, 64);
  _tile_stored(1, s + kScoreTile, 64);
  if constexpr (kTiles == 2) {
    _tile_stored(2, s + kScoreBlock, 64);
    _tile_stored(3, s + kScoreBlock + kScoreTile, 64);
  }
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
void update_maxima(const Rows& rows, const float* s, RowState& state) {
  for (int tile = 0; tile < kTiles; ++tile, s += kScoreBlock) {
    f32x16* lanes = state.lanes + tile * kRows;
    for (int r = 0, end = rows.in_tile(tile); r < end; ++r) {
      const f32x16 both = _mm512_max_ps(load(s + r * kLanes), load(s + kScoreTile + r * kLanes));
      lanes[r] = _mm512_max_ps(lanes[r], both);
    }
  }
}

// Scores become probabilities (not yet divided by their sum) in place: a row's 32 in bf16 take the
// place of its first 16 scores, so each tile is a left operand of P V.
template <int kTiles>
void exponentiate(const Rows& rows, float factor, float* s, RowState& state) {
  for (int tile = 0; tile < kTiles; ++tile, s += kScoreBlock) {
    for (int r = 0, end = rows.in_tile(tile); r < end; ++r) {
      float* low = s + r * kLanes;
      const f32x16 exponent = splat(state.exponent[tile * kRows + r]);
      const f32x16 p0 = exp2(_mm512_fmsub_ps(load(low), splat(factor), exponent));
      const f32x16 p1 = exp2(_mm512_fmsub_ps(load(low + kScoreTile), splat(factor), exponent));
      f32x16& lanes = state.lanes[tile * kRows + r];
      lanes = _mm512_add_ps(lanes, _mm512_add_ps(p0, p1));
      _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    }
  }
}

void finish_maxima(float factor, int num_tiles, RowState& state) {
  for (int tile = 0; tile < num_tiles; ++tile) {
    f32x16* lanes = state.lanes + tile * kRows;
    const f32x16 maxima = combine_lanes(lanes, Max());
    store(state.exponent + tile * kRows, _mm512_mul_ps(maxima, splat(factor)));
    std::fill_n(lanes, kRows, splat(0.0f));
  }
}

void finish_sums(const Call& call, const Rows& rows, int num_tiles, RowState& state) {
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int first = tile * kRows;
    const f32x16 sums = combine_lanes(state.lanes + first, Add());
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
void write_output(const Call& call, const Rows& rows, const RowState& state, int column,
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

// 32 columns of P V over all blocks.
template <int kTiles>
void multiply_values(const bf16* v, std::ptrdiff_t block_stride, const std::int32_t* blocks,
                     int num_blocks, const float* p, float* tiles) {
  amx::fence();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
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
  _tile_stored(0, tiles, 64);
  _tile_stored(1, tiles + kScoreTile, 64);
  if constexpr (kTiles == 2) {
    _tile_stored(2, tiles + kScoreBlock, 64);
    _tile_stored(3, tiles + kScoreBlock + kScoreTile, 64);
  }
}

template <int kTiles>
void attend_item(const Call& call, const Item& item) {
  thread_local Scratch query_memory, score_memory;
  const AttentionShape& shape = call.shape;
  const Rows rows(item, shape.group());
  const int first_key =
      shape.window > 0 ? std::max(0, rows.first_position() + 1 - shape.window) : 0;
  const int first_block = first_key / kBlockTokens;
  const int num_blocks = rows.last_position() / kBlockTokens + 1 - first_block;
  const std::int32_t* blocks = item.sequence->blocks + first_block;
  const std::ptrdiff_t head_stride = std::ptrdiff_t(kBlockTokens) * shape.head_dim;
  const std::ptrdiff_t block_stride = shape.num_kv_heads * head_stride;
  const float factor = shape.scale * kLog2E;

  bf16* q = query_memory.get<bf16>(std::size_t(kMaxTiles) * kRows * shape.head_dim);
  float* s = score_memory.get<float>(std::size_t(kTiles) * kScoreBlock * num_blocks);
  RowState state;
  std::fill_n(state.lanes, kTiles * kRows, splat(kMinusInfinity));
  load_queries(call, rows, q);
  const bf16* k = call.cache.k + item.kv_head * head_stride;
  for (int b = 0; b < num_blocks; ++b) {
    float* scores = s + b * kTiles * kScoreBlock;
    const int key = (first_block + b) * kBlockTokens;
    score_block<kTiles>(q, k + blocks[b] * block_stride, shape.head_dim, scores);
    const bool seen_by_all =
        key + kBlockTokens - 1 <= rows.first_position() &&
        (shape.window == 0 || key > rows.last_position() - shape.window);
    if (!seen_by_all) mask_block(rows, shape.window, key, scores);
    update_maxima<kTiles>(rows, scores, state);
  }
  finish_maxima(factor, kTiles, state);
  for (int b = 0; b < num_blocks; ++b) {
    exponentiate<kTiles>(rows, factor, s + b * kTiles * kScoreBlock, state);
  }
  finish_sums(call, rows, kTiles, state);
  alignas(64) float tiles[kTiles * kScoreBlock];
  const bf16* v = call.cache.v + item.kv_head * head_stride;
  for (int column = 0; column < shape.head_dim; column += 2 * amx::kTileRows) {
    multiply_values<kTiles>(v + column * kBlockTokens, block_stride, blocks, num_blocks, s, tiles);
    write_output(call, rows, state, column, tiles);
  }
}

// The last rows of a sequence first: they see most keys, and the loop should end with small items.
std::vector<Item> items_of(const AttentionShape& shape, const SequenceRows* sequences,
                           int num_sequences) {
  constexpr int kItemRows = kMaxTiles * kRows;
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
