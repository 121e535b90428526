#include "attention_panels.hpp"

#include <algorithm>
#include <limits>

#include "attention_tiles.hpp"

namespace kernels {
namespace {

std::ptrdiff_t block_elements(int head_dim) { return std::ptrdiff_t(kBlockTokens) * head_dim; }

// 32 rows of which ``count`` exist; a copy padded with zeros where some do not.
struct PaddedRows {
  const bf16* rows;
  std::ptrdiff_t ld;

  PaddedRows(const bf16* from, std::ptrdiff_t from_ld, int count, int head_dim, bf16* padded)
      : rows(from), ld(from_ld) {
    if (count == kBlockTokens) return;
    std::fill_n(padded, block_elements(head_dim), bf16(0));
    for (int r = 0; r < count; ++r) {
      std::copy_n(from + r * from_ld, head_dim, padded + r * head_dim);
    }
    rows = padded;
    ld = head_dim;
  }
};

int rows_of_block(const SequenceRows& sequence, int block) {
  return std::min(kBlockTokens, sequence.num_rows - block * kBlockTokens);
}

// ``count`` rows of [D / 32][2][2] tiles of 16 rows x 16 d, times ``factor``, in bf16.
void write_rows(const float* squares, int count, int head_dim, float factor, bf16* to,
                std::ptrdiff_t ld) {
  for (int d = 0; d < head_dim; d += kBlockTokens, squares += kSquareFloats) {
    for (int r = 0; r < count; ++r) {
      const float* low =
          squares + r / tiles::kTileRows * 2 * kTileFloats + r % tiles::kTileRows * kLanes;
      const f32x16 a = _mm512_mul_ps(load(low), splat(factor));
      const f32x16 b = _mm512_mul_ps(load(low + kTileFloats), splat(factor));
      _mm512_storeu_si512(to + r * ld + d, narrow(a, b));
    }
  }
}

// [2 tiles of d][2 tiles of rows] to [2 tiles of rows][2 tiles of d]. A float is as wide as a pair.
void transpose_square(const float* from, float* to) {
  for (int i = 0; i < 4; ++i) {
    const int transposed = (i & 1) << 1 | i >> 1;
    tiles::transpose_pairs(reinterpret_cast<const bf16*>(from + i * kTileFloats), 2 * kLanes,
                         reinterpret_cast<bf16*>(to + transposed * kTileFloats));
  }
}

// Lane r: sum over d of a[r] * b[r], of which only the first ``count`` rows are read.
f32x16 dot_rows(const bf16* a, const bf16* b, std::ptrdiff_t ld, int count, int head_dim) {
  f32x16 sums[tiles::kTileRows];
  for (int r = 0; r < tiles::kTileRows; ++r) {
    sums[r] = splat(0.0f);
    if (r >= count) continue;
    for (int d = 0; d < head_dim; d += kLanes) {
      sums[r] = _mm512_fmadd_ps(load(a + r * ld + d), load(b + r * ld + d), sums[r]);
    }
  }
  return combine_lanes(sums, AddLanes());
}

}  // namespace

std::vector<PanelShape> panels_of(const AttentionShape& shape, int num_blocks) {
  const int num_parts = divide_up(shape.group(), kPanelSquares);
  const int members = divide_up(shape.group(), num_parts);
  // A power of two that divides the first block of every part.
  const int blocks = members >= 4 ? 1 : members >= 2 ? 2 : 4;
  std::vector<PanelShape> panels;
  for (int first = 0; first < num_blocks; first += blocks) {
    for (int member = 0; member < shape.group(); member += members) {
      panels.push_back({{first, std::min(blocks, num_blocks - first)},
                        member,
                        std::min(members, shape.group() - member)});
    }
  }
  return panels;
}

KeyPanel::KeyPanel(Arena& memory, int num_blocks, int head_dim)
    : stride_(block_elements(head_dim)),
      keys_(memory.take<bf16>(num_blocks * stride_)),
      values_(memory.take<bf16>(num_blocks * stride_)),
      columns_(memory.take<bf16>(num_blocks * stride_)),
      rows_(memory.take<bf16>(stride_)),
      pairs_(memory.take<bf16>(stride_)),
      dk_(memory.take<float>(num_blocks * stride_)),
      dv_(memory.take<float>(num_blocks * stride_)) {}

void KeyPanel::load(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
                    BlockRange blocks) {
  const int head_dim = call.shape.head_dim;
  for (int b = 0; b < blocks.count; ++b) {
    const int block = blocks.first + b, count = rows_of_block(sequence, block);
    const bf16* k = call.qkv + (sequence.row + std::ptrdiff_t(block) * kBlockTokens) * call.ld +
                    call.shape.query_columns() + std::ptrdiff_t(kv_head) * head_dim;
    const PaddedRows keys(k, call.ld, count, head_dim, rows_);
    pack_left(keys.rows, keys.ld, head_dim, keys_ + b * stride_);
    pack_pairs(keys.rows, keys.ld, head_dim, pairs_);
    pairs_to_columns(pairs_, head_dim, columns_ + b * stride_);
    const PaddedRows values(k + call.shape.key_columns(), call.ld, count, head_dim, rows_);
    pack_left(values.rows, values.ld, head_dim, values_ + b * stride_);
  }
  std::fill_n(dk_, blocks.count * stride_, 0.0f);
  std::fill_n(dv_, blocks.count * stride_, 0.0f);
}

void KeyPanel::write(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
                     BlockRange blocks) const {
  const AttentionShape& shape = call.shape;
  for (int b = 0; b < blocks.count; ++b) {
    const int block = blocks.first + b, count = rows_of_block(sequence, block);
    bf16* to = call.dqkv +
               (sequence.row + std::ptrdiff_t(block) * kBlockTokens) * shape.columns() +
               shape.query_columns() + std::ptrdiff_t(kv_head) * shape.head_dim;
    write_rows(dk(b), count, shape.head_dim, shape.scale, to, shape.columns());
    write_rows(dv(b), count, shape.head_dim, 1.0f, to + shape.key_columns(), shape.columns());
  }
}

QueryPanel::QueryPanel(Arena& memory, int head_dim)
    : stride_(block_elements(head_dim)),
      q_transposed_(memory.take<bf16>(kPanelSquares * stride_)),
      q_pairs_(memory.take<bf16>(kPanelSquares * stride_)),
      do_transposed_(memory.take<bf16>(kPanelSquares * stride_)),
      do_pairs_(memory.take<bf16>(kPanelSquares * stride_)),
      rows_(memory.take<bf16>(stride_)),
      statistics_(memory.take<QueryStatistics>(kPanelSquares)),
      dq_(memory.take<float>(kPanelSquares * stride_)) {}

void QueryPanel::load(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
                      const PanelShape& shape) {
  const int head_dim = call.shape.head_dim;
  const std::ptrdiff_t ldo = call.shape.query_columns();
  for (int i = 0; i < shape.num_squares(); ++i) {
    const int block = shape.query_block(i), count = rows_of_block(sequence, block);
    const int head = kv_head * call.shape.group() + shape.member(i);
    const std::ptrdiff_t row = sequence.row + std::ptrdiff_t(block) * kBlockTokens;
    const std::ptrdiff_t column = std::ptrdiff_t(head) * head_dim;
    const PaddedRows q(call.qkv + row * call.ld + column, call.ld, count, head_dim, rows_);
    pack_transposed(q.rows, q.ld, head_dim, q_transposed_ + i * stride_);
    pack_pairs(q.rows, q.ld, head_dim, q_pairs_ + i * stride_);
    const std::ptrdiff_t place = row * ldo + column;
    const PaddedRows d_o(call.d_o + place, ldo, count, head_dim, rows_);
    pack_transposed(d_o.rows, d_o.ld, head_dim, do_transposed_ + i * stride_);
    pack_pairs(d_o.rows, d_o.ld, head_dim, do_pairs_ + i * stride_);
    QueryStatistics& statistics = statistics_[i];
    for (int r = 0; r < kBlockTokens; r += tiles::kTileRows) {
      const std::ptrdiff_t from = place + r * ldo;
      store(statistics.delta + r,
            dot_rows(call.o + from, call.d_o + from, ldo, count - r, head_dim));
    }
    for (int r = 0; r < kBlockTokens; ++r) {
      statistics.exponent[r] = r < count
                                   ? call.lse[(row + r) * call.shape.num_heads + head] * kLog2E
                                   : std::numeric_limits<float>::infinity();
    }
  }
}

void write_queries(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
                   const PanelShape& panel, const float* dq) {
  const AttentionShape& shape = call.shape;
  const std::ptrdiff_t ld = shape.columns();
  alignas(64) float square[kSquareFloats];
  for (int i = 0; i < panel.num_squares(); ++i) {
    const int block = panel.query_block(i), count = rows_of_block(sequence, block);
    const int head = kv_head * shape.group() + panel.member(i);
    bf16* to = call.dqkv + (sequence.row + std::ptrdiff_t(block) * kBlockTokens) * ld +
               std::ptrdiff_t(head) * shape.head_dim;
    for (int d = 0; d < shape.head_dim; d += kBlockTokens, dq += kSquareFloats) {
      transpose_square(dq, square);
      write_rows(square, count, kBlockTokens, shape.scale, to + d, ld);
    }
  }
}

}  // namespace kernels
