// Rows of the forward pass of attention and what happens to their scores between the products.
//
// Scores of a cache block lie as [tile][2][16 rows][16 keys] floats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tiles.hpp"
#include "attention.hpp"
#include "attention_math.hpp"

namespace kernels::forward {

inline constexpr int kRows = tiles::kTileRows;
inline constexpr int kMaxTiles = 2;                 // row tiles that are taken together
inline constexpr int kScoreTile = kRows * kLanes;   // floats of 16 rows x 16 keys
inline constexpr int kScoreBlock = 2 * kScoreTile;  // floats of 16 rows x one cache block
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct ForwardCall {
  const AttentionShape& shape;
  const bf16* qkv;
  std::ptrdiff_t ld;
  LayerCache cache;
  bf16* o;
  float* lse;
};

// Some rows of one sequence and key/value head.
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

// What is known of up to 32 rows on their way through the keys.
template <int kTiles>
struct alignas(64) RowState {
  static constexpr int kCount = kTiles * kRows;
  f32x16 maxima[kCount];          // of a span, still apart by key % 16
  f32x16 sums[kCount];            // of all spans, likewise
  float maximum[kCount];          // of all spans
  float exponent[kCount] = {};    // maximum * scale * log2 e, 0 while there is none
  float correction[kCount] = {};  // of what earlier spans gave
  float inverse_sum[kCount] = {};

  RowState() {
    std::fill_n(sums, kCount, splat(0.0f));
    std::fill_n(maximum, kCount, kMinusInfinity);
  }
};

// [tile][D / 32][16 rows][32], left operands. Rows past the last keep what they had.
inline void load_queries(const ForwardCall& call, const Rows& rows, bf16* q) {
  const int head_dim = call.shape.head_dim;
  for (int r = 0; r < rows.count; ++r) {
    const bf16* from = call.qkv + rows.row[r] * call.ld + std::ptrdiff_t(rows.head[r]) * head_dim;
    bf16* to = q + r / kRows * kRows * head_dim + r % kRows * tiles::kTileSum;
    for (int d = 0; d < head_dim; d += tiles::kTileSum) {
      _mm512_storeu_si512(to + d * kRows, _mm512_loadu_si512(from + d));
    }
  }
}

// -inf where the row may not see the key, so that later passes need no masks.
inline void mask_block(const Rows& rows, int window, int first_key, float* s) {
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
inline void update_maxima(const Rows& rows, const float* s, RowState<kTiles>& state) {
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
inline void exponentiate(const Rows& rows, float factor, float* s, RowState<kTiles>& state) {
  for (int tile = 0; tile < kTiles; ++tile, s += kScoreBlock) {
    for (int r = 0, end = rows.in_tile(tile); r < end; ++r) {
      float* low = s + r * kLanes;
      const f32x16 exponent = splat(state.exponent[tile * kRows + r]);
      const f32x16 p0 = exp2(_mm512_fmsub_ps(load(low), splat(factor), exponent));
      const f32x16 p1 = exp2(_mm512_fmsub_ps(load(low + kScoreTile), splat(factor), exponent));
      f32x16& lanes = state.sums[tile * kRows + r];
      lanes = _mm512_add_ps(lanes, _mm512_add_ps(p0, p1));
      _mm512_storeu_si512(low, narrow(p0, p1));
    }
  }
}

// Takes the maxima of a span into account; true if some row's grew.
template <int kTiles>
inline bool raise_maxima(float factor, RowState<kTiles>& state) {
  __mmask16 grown = 0;
  for (int first = 0; first < kTiles * kRows; first += kRows) {
    const f32x16 old = load(state.maximum + first);
    const f32x16 now = _mm512_max_ps(old, combine_lanes(state.maxima + first, MaxLanes()));
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
inline void rescale(const Rows& rows, int head_dim, RowState<kTiles>& state, float* o) {
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
inline void finish_sums(const ForwardCall& call, const Rows& rows, RowState<kTiles>& state) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int first = tile * kRows;
    const f32x16 sums = combine_lanes(state.sums + first, AddLanes());
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
inline void write_output(const ForwardCall& call, const Rows& rows, const RowState<kTiles>& state,
                         int column, const float* tiles) {
  const std::ptrdiff_t ld = call.shape.query_columns();
  for (int r = 0; r < rows.count; ++r) {
    const float* low = tiles + r / kRows * kScoreBlock + r % kRows * kLanes;
    const f32x16 factor = splat(state.inverse_sum[r]);
    // Plus zero: a sum of -0 becomes +0, as if further zeros had been added to it.
    const f32x16 a = _mm512_fmadd_ps(load(low), factor, splat(0.0f));
    const f32x16 b = _mm512_fmadd_ps(load(low + kScoreTile), factor, splat(0.0f));
    bf16* to = call.o + rows.row[r] * ld +
               std::ptrdiff_t(rows.head[r]) * call.shape.head_dim + column;
    _mm512_storeu_si512(to, narrow(a, b));
  }
}

}  // namespace kernels::forward
