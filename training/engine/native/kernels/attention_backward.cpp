// Attention, backward.
//
// A work item is a part of the keys of one key/value head of one sequence. It visits panels of
// queries in ascending order and computes transposed probabilities P^T = exp(K Q^T - lse) and
// dS^T = P^T (V dO^T - delta), a block of 32 keys times 32 queries at a time; then
//   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T.
// The derivative of a query that sees several parts is summed over them in ascending order. Parts
// and panels follow from the shape and the length of the sequence, so every sum has one order.
#include <algorithm>
#include <limits>
#include <vector>

#include "tiles.hpp"
#include "attention.hpp"
#include "attention_math.hpp"
#include "attention_panels.hpp"
#include "attention_tiles.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

// Keys of a part: half of a sequence, so that one long sequence keeps two threads busy, within what
// pays for the partial sums (least) and fits a core's second cache (most); a quarter where that is
// more, which bounds the memory for partial sums.
constexpr int kLeastPartBlocks = 512 / kBlockTokens;
constexpr int kMostPartBlocks = 1024 / kBlockTokens;

// Keys [first, first + count) blocks of one head, and where the derivatives of the queries that see
// them go: [position block from ``first`` on][G] squares of floats, or null for straight to dqkv.
struct Part {
  const SequenceRows* sequence;
  int kv_head;
  BlockRange keys;
  std::size_t partial;  // offset in floats
  bool is_only;

  int num_query_blocks() const { return divide_up(sequence->num_rows, kBlockTokens); }
};

int blocks_of_part(int num_blocks) {
  const int most = std::max(kMostPartBlocks, divide_up(num_blocks, 4));
  return round_up(std::clamp(divide_up(num_blocks, 2), kLeastPartBlocks, most), kPanelBlocks);
}

// Probabilities and score derivatives of 32 keys x 32 queries.
struct SquareOut {
  bf16* p;         // left: [2 tiles of keys][16 keys][32 queries]
  bf16* ds;        // left, likewise
  bf16* ds_pairs;  // right: [2 tiles of queries][16 pairs of keys][16 queries][2]
};

// Queries (bit i: query i of 32) that may see ``key``, both counted from the same position.
std::uint32_t queries_seeing(int key, int first_query, int window) {
  const int begin = std::clamp(key - first_query, 0, kBlockTokens);
  const int end = window > 0 ? std::clamp(key - first_query + window, 0, kBlockTokens)
                             : kBlockTokens;
  if (begin >= end) return 0;
  return std::uint32_t((std::uint64_t(1) << end) - (std::uint64_t(1) << begin));
}

// Rows of dS^T (bf16) of one key; stores its P^T row.
template <bool kMasked>
inline __m512i differentiate_row(const float* s, const float* dp, const QueryStatistics& queries,
                                 float factor, std::uint32_t seen, bf16* p_row) {
  f32x16 p[2], ds[2];
  for (int half = 0; half < 2; ++half) {
    const f32x16 x = _mm512_fmsub_ps(load(s + half * kTileFloats), splat(factor),
                                     load(queries.exponent + half * kLanes));
    p[half] = exp2(x);
    if constexpr (kMasked) p[half] = _mm512_maskz_mov_ps(__mmask16(seen >> half * kLanes), p[half]);
    ds[half] = _mm512_mul_ps(
        p[half], _mm512_sub_ps(load(dp + half * kTileFloats), load(queries.delta + half * kLanes)));
  }
  _mm512_storeu_si512(p_row, narrow(p[0], p[1]));
  return narrow(ds[0], ds[1]);
}

template <bool kMasked>
void differentiate_square(const float* s, const float* dp, const QueryStatistics& queries,
                          float factor, int key, int query, int window, const SquareOut& out) {
  for (int k = 0; k < kBlockTokens; k += 2) {
    const int at = k / tiles::kTileRows * 2 * kTileFloats + k % tiles::kTileRows * kLanes;
    __m512i rows[2];
    for (int odd = 0; odd < 2; ++odd) {
      const std::uint32_t seen = kMasked ? queries_seeing(key + k + odd, query, window) : 0;
      const int from = at + odd * kLanes;
      rows[odd] = differentiate_row<kMasked>(s + from, dp + from, queries, factor, seen,
                                             out.p + (k + odd) * tiles::kTileSum);
      _mm512_storeu_si512(out.ds + (k + odd) * tiles::kTileSum, rows[odd]);
    }
    bf16* low = out.ds_pairs + k * kLanes;
    tiles::interleave_rows(rows[0], rows[1], low, low + tiles::kTileElements);
  }
}

class PartBackward {
 public:
  PartBackward(const BackwardCall& call, const Part& part, float* partials, Arena& memory)
      : call_(call),
        part_(part),
        partials_(partials),
        head_dim_(call.shape.head_dim),
        keys_(memory, part.keys.count, head_dim_),
        panel_(memory, head_dim_),
        squares_(memory.take<bf16>(std::size_t(3) * kPanelBlocks * kPanelSquares * kSquare)),
        s_(memory.take<float>(kSquareFloats)),
        dp_(memory.take<float>(kSquareFloats)) {}

  void run() {
    keys_.load(call_, *part_.sequence, part_.kv_head, part_.keys);
    for (const PanelShape& shape : panels_of(call_.shape, part_.num_query_blocks())) {
      if (sees(shape, part_.keys, call_.shape.window)) visit(shape);
    }
    keys_.write(call_, *part_.sequence, part_.kv_head, part_.keys);
  }

 private:
  static constexpr int kSquare = kBlockTokens * kBlockTokens;

  SquareOut square(int key_block, int index) const {
    constexpr std::ptrdiff_t kKind = std::ptrdiff_t(kPanelBlocks) * kPanelSquares * kSquare;
    bf16* at = squares_ + (std::ptrdiff_t(key_block) * kPanelSquares + index) * kSquare;
    return {at, at + kKind, at + 2 * kKind};
  }

  void visit(const PanelShape& shape) {
    panel_.load(call_, *part_.sequence, part_.kv_head, shape);
    float* dq = panel_.dq();
    if (!part_.is_only) {
      dq = partials_ + part_.partial + shape.offset(call_.shape, part_.keys.first);
    }
    std::fill_n(dq, std::size_t(shape.num_squares()) * kBlockTokens * head_dim_, 0.0f);
    for (int first = 0; first < part_.keys.count; first += kPanelBlocks) {
      const int count = std::min(kPanelBlocks, part_.keys.count - first);
      if (sees(shape, {part_.keys.first + first, count}, call_.shape.window)) {
        visit_keys(shape, first, count, dq);
      }
    }
    if (part_.is_only) write_queries(call_, *part_.sequence, part_.kv_head, shape, dq);
  }

  // ``first``: of ``count`` key blocks, counted from the part's own first.
  void visit_keys(const PanelShape& shape, int first, int count, float* dq) {
    std::uint32_t seeing[kPanelBlocks] = {};          // squares of the panel that see a key block
    std::uint32_t seen[kPanelSquares] = {};           // key blocks that a square of the panel sees
    for (int b = 0; b < count; ++b) {
      for (int q = 0; q < shape.num_squares(); ++q) {
        if (!sees(shape.query_block(q), part_.keys.first + first + b, call_.shape.window)) continue;
        differentiate(shape, first + b, q, square(b, q));
        seeing[b] |= 1u << q;
        seen[q] |= 1u << b;
      }
    }
    for (int b = 0; b < count; ++b) accumulate_keys(first + b, seeing[b], square(b, 0));
    const std::ptrdiff_t block = std::ptrdiff_t(kBlockTokens) * head_dim_;
    for (int q = 0; q < shape.num_squares(); ++q) {
      const bf16* right = square(0, q).ds_pairs;
      for (int d = 0; d < head_dim_; d += kBlockTokens) {
        accumulate_over_rows(keys_.columns(first) + d * kBlockTokens, block, right,
                             std::ptrdiff_t(kPanelSquares) * kSquare, seen[q],
                             dq + q * block + d * kBlockTokens);
      }
    }
  }

  void differentiate(const PanelShape& shape, int key_block, int q, const SquareOut& out) {
    multiply_over_d(keys_.keys(key_block), panel_.q_transposed(q), head_dim_, s_);
    multiply_over_d(keys_.values(key_block), panel_.do_transposed(q), head_dim_, dp_);
    const float factor = call_.shape.scale * kLog2E;
    const int window = call_.shape.window;
    const int key = (part_.keys.first + key_block) * kBlockTokens;
    const int query = shape.query_block(q) * kBlockTokens;
    const bool is_whole = key + kBlockTokens <= query + 1 &&
                          (window == 0 || key > query + kBlockTokens - 1 - window);
    if (is_whole) {
      differentiate_square<false>(s_, dp_, panel_.statistics(q), factor, key, query, window, out);
    } else {
      differentiate_square<true>(s_, dp_, panel_.statistics(q), factor, key, query, window, out);
    }
  }

  void accumulate_keys(int key_block, std::uint32_t seeing, const SquareOut& first) {
    if (seeing == 0) return;
    const std::ptrdiff_t block = std::ptrdiff_t(kBlockTokens) * head_dim_;
    for (int d = 0; d < head_dim_; d += kBlockTokens) {
      const std::ptrdiff_t at = d * kBlockTokens;
      accumulate_over_rows(first.p, kSquare, panel_.do_pairs(0) + at, block, seeing,
                           keys_.dv(key_block) + at);
      accumulate_over_rows(first.ds, kSquare, panel_.q_pairs(0) + at, block, seeing,
                           keys_.dk(key_block) + at);
    }
  }

  const BackwardCall& call_;
  const Part& part_;
  float* partials_;
  const int head_dim_;
  KeyPanel keys_;
  QueryPanel panel_;
  bf16* squares_;
  float* s_;
  float* dp_;
};

std::vector<Part> parts_of(const AttentionShape& shape, const SequenceRows* sequences,
                           int num_sequences, std::size_t& num_partials) {
  std::vector<Part> parts;
  num_partials = 0;
  for (int s = 0; s < num_sequences; ++s) {
    const int blocks = divide_up(sequences[s].num_rows, kBlockTokens);
    const int step = blocks_of_part(blocks);
    for (int first = 0; first < blocks; first += step) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        const bool is_only = blocks <= step;
        parts.push_back(
            {sequences + s, head, {first, std::min(step, blocks - first)}, num_partials, is_only});
        if (!is_only) {
          num_partials +=
              std::size_t(blocks - first) * shape.group() * kBlockTokens * shape.head_dim;
        }
      }
    }
  }
  return parts;
}

// Largest first, so that the loop ends with small items.
std::vector<int> order_of(const std::vector<Part>& parts) {
  std::vector<int> order(parts.size());
  for (int i = 0; i < int(order.size()); ++i) order[i] = i;
  const auto cost = [&](int i) {
    const BlockRange keys = parts[i].keys;
    return keys.count * (2 * (parts[i].num_query_blocks() - keys.first) - keys.count);
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost(a) > cost(b); });
  return order;
}

// A panel of queries whose derivative lies in several parts.
struct Sum {
  const Part* first;  // the parts of one head lie ``stride`` apart
  const Part* end;
  int stride;
  PanelShape shape;
};

std::vector<Sum> sums_of(const AttentionShape& shape, const std::vector<Part>& parts) {
  std::vector<Sum> sums;
  for (const Part& part : parts) {
    if (part.is_only || part.keys.first != 0) continue;
    const Part* end = parts.data() + parts.size();
    for (const PanelShape& panel : panels_of(shape, part.num_query_blocks())) {
      sums.push_back({&part, end, shape.num_kv_heads, panel});
    }
  }
  return sums;
}

void add_parts(const BackwardCall& call, const Sum& sum, const float* partials) {
  thread_local Scratch memory;
  const std::size_t count =
      std::size_t(sum.shape.num_squares()) * kBlockTokens * call.shape.head_dim;
  float* total = memory.get<float>(count);
  std::fill_n(total, count, 0.0f);
  const SequenceRows* sequence = sum.first->sequence;
  for (const Part* part = sum.first; part < sum.end && part->sequence == sequence;
       part += sum.stride) {
    if (!sees(sum.shape, part->keys, call.shape.window)) continue;
    const float* from =
        partials + part->partial + sum.shape.offset(call.shape, part->keys.first);
    for (std::size_t i = 0; i < count; i += kLanes) {
      store(total + i, _mm512_add_ps(load(total + i), load(from + i)));
    }
  }
  write_queries(call, *sequence, sum.first->kv_head, sum.shape, total);
}

}  // namespace

void attend_backward(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
                     const SequenceRows* sequences, int num_sequences, const bf16* o,
                     const bf16* d_o, const float* lse, bf16* dqkv) {
  thread_local Scratch partial_memory;
  const BackwardCall call{shape, qkv, ld, o, d_o, lse, dqkv};
  std::size_t num_partials = 0;
  const std::vector<Part> parts = parts_of(shape, sequences, num_sequences, num_partials);
  const std::vector<int> order = order_of(parts);
  float* partials = partial_memory.get<float>(num_partials);
  parallel_for(int(parts.size()), [&](int item, int) {
    thread_local Arena memory;
    memory.reset();
    PartBackward(call, parts[order[item]], partials, memory).run();
  });
  const std::vector<Sum> sums = sums_of(shape, parts);
  if (sums.empty()) return;
  parallel_for(int(sums.size()), [&](int item, int) { add_parts(call, sums[item], partials); });
}

}  // namespace kernels
