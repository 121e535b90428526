// What logprobs and sampling share: sums of exponentials over blocks of a row of logits.
//
// Both go through here so that a token's logprob has the same bits in training and in sampling.
#pragma once

#include <cmath>

#include "base.hpp"

namespace kernels::softmax {

// Tokens of a block: summed in fp32, while blocks are summed in double.
inline constexpr int kBlock = 256;

// NaN may be overlooked: the sum of exponentials has it.
inline float largest(const float* logits, int V) {
  f32x16 best[4];
  for (f32x16& each : best) each = splat(-INFINITY);
  int start = 0;
  for (; start + 4 * kLanes <= V; start += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      best[i] = _mm512_max_ps(best[i], load(logits + start + i * kLanes));
    }
  }
  for (; start < V; start += kLanes) {
    const __mmask16 lanes = first_lanes(V - start);
    best[0] = _mm512_mask_max_ps(best[0], lanes, best[0], load(logits + start, lanes));
  }
  return max(_mm512_max_ps(_mm512_max_ps(best[0], best[1]), _mm512_max_ps(best[2], best[3])));
}

// A row of logits, ``best`` the largest of them, under softmax(scale * logits).
struct Logits {
  const float* values;
  int V;
  float best, scale;

  f32x16 at(int id, __mmask16 lanes) const { return load(values + id, lanes); }

  // Probability relative to the best token's. Exact in ``best``, and in all where scale is 1.
  f32x16 weigh(f32x16 logits) const {
    return exp(_mm512_mul_ps(_mm512_sub_ps(logits, splat(best)), splat(scale)));
  }
  float logprob(std::int32_t id, double lse) const {
    return float(double(values[id]) * scale - lse);
  }
};

// Tokens of a row in order of descending logit, then ascending id, up to and with (value, id).
struct Bound {
  float value = -INFINITY;
  std::int32_t id = INT32_MAX;

  bool is_whole() const { return id == INT32_MAX; }

  __mmask16 holds(f32x16 logits, int first_id, __mmask16 lanes) const {
    const __mmask16 above = _mm512_mask_cmp_ps_mask(lanes, logits, splat(value), _CMP_GT_OQ);
    const __mmask16 equal = _mm512_mask_cmp_ps_mask(lanes, logits, splat(value), _CMP_EQ_OQ);
    if (equal == 0) return above;
    const __m512i ids = _mm512_add_epi32(
        _mm512_set1_epi32(first_id),
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    return above | _mm512_mask_cmple_epi32_mask(equal, ids, _mm512_set1_epi32(id));
  }
};

// Weights of ids [begin, end), at most kBlock of them.
inline float block_sum(const Logits& row, int begin, int end) {
  f32x16 even = splat(0), odd = splat(0);
  int at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {
    even = _mm512_add_ps(even, row.weigh(load(row.values + at)));
    odd = _mm512_add_ps(odd, row.weigh(load(row.values + at + kLanes)));
  }
  for (; at < end; at += kLanes) {
    const __mmask16 lanes = first_lanes(end - at);
    even = _mm512_mask_add_ps(even, lanes, even, row.weigh(row.at(at, lanes)));
  }
  return sum(_mm512_add_ps(even, odd));
}

// Of those inside the bound: most vectors have none.
inline float block_sum(const Logits& row, int begin, int end, const Bound& bound) {
  f32x16 total = splat(0);
  for (int at = begin; at < end; at += kLanes) {
    const f32x16 values = row.at(at, first_lanes(end - at));
    const __mmask16 lanes = bound.holds(values, at, first_lanes(end - at));
    if (lanes != 0) total = _mm512_mask_add_ps(total, lanes, total, row.weigh(values));
  }
  return sum(total);
}

inline int block_end(int block, int V) {
  return (block + 1) * kBlock < V ? (block + 1) * kBlock : V;
}

// log(sum(exp(scale * logits))). ``on_block(end)`` sees the sum of weights after each block.
template <typename OnBlock>
inline double log_sum_exp(const Logits& row, const OnBlock& on_block) {
  double total = 0;
  for (int block = 0; block * kBlock < row.V; ++block) {
    total += block_sum(row, block * kBlock, block_end(block, row.V));
    on_block(total);
  }
  return double(row.best) * row.scale + std::log(total);
}

}  // namespace kernels::softmax
